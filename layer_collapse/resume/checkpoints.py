"""A run that can be killed at any moment and goes on: all that a training loop holds, saved."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint
from ..measure.tracker import EntropyTracker
from ..prune.masks import Masks
from ..ranks import Group
from .folder import check_files, locked, own_file, publish, read_manifest, remove, sums_of
from .processes import Processes
from .run import RunState
from .tensors import check_content, read_tensors, write_tensors
from .tree import described, rebuilt, zeros_like

__all__ = ["Checkpoints"]

_NAME = re.compile(r"step-(\d{9,18})")
_ROOM, _KEPT = "make room or repair it", "earlier checkpoints are as they were"
_OTHER = "build the run as it was saved, or choose another folder"
_SAME = "build the same run on every process"


class Checkpoints:
    """Saves and restores a run: weights, masks, optimiser, counts, random generators.

    A checkpoint is a folder ``step-<number>`` that takes its name in one rename, once all processes
    have written their part, flushed it to the disk and read it back. Whatever is killed, and when,
    the last whole one stays. Files are safetensors and JSON; nothing is unpickled. Weights and
    states that are spread over processes (FSDP2, DTensor) are written by each process for its part,
    through torch.distributed.checkpoint; the folder must be one that all processes see.

        checkpoints = lc.Checkpoints("runs/mine", model, optimizer, masks, tracker)
        start = checkpoints.load() or 0
        for step in range(start, steps):
            ...
            if (step + 1) % 100 == 0:
                checkpoints.save(step + 1)

    A run that is resumed equals the uninterrupted one bit for bit if its loop draws what it needs
    from the generators of torch, ``random`` or ``numpy.random`` after a checkpoint, and its ops are
    deterministic, as torch's are on the CPU.

    Args:
        folder: where checkpoints lie; made if it is not there.
        model: the model, wrapped by DistributedDataParallel or ``fully_shard`` or not.
        optimizer: over its parameters.
        masks: of its weights, if any.
        tracker: of its rectifiers, if counts are to go on.
        others: what else has ``state_dict`` and ``load_state_dict``: a schedule, a GradScaler;
            equal on all processes.
        keep: how many checkpoints stay; older ones are removed after a save.
        group: the processes that save together; None is all of them.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        masks: Masks | None = None,
        tracker: EntropyTracker | None = None,
        *,
        others: Mapping[str, Any] | None = None,
        keep: int = 2,
        group: Group = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"Checkpoints: keep must be at least 1 (got {keep})")
        self.folder, self.keep = Path(folder), keep
        self._run = RunState(model, optimizer, masks, tracker, dict(others or {}))
        self._all = Processes(group, next(model.parameters()).device)

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int) -> Path:
        """Write a checkpoint; all processes must call it, between two steps.

        Args:
            step: its number, e.g. the steps done so far.

        Returns:
            Its folder.

        Raises:
            ValueError: there is one of this step or a later one, another run is saving there,
                processes differ in what they save, or the optimiser has not stepped yet.
            OSError: a process cannot write (disk full, no permission). As for every error, all
                processes raise the same sentence, and the checkpoints that there were stay.
        """
        target = self._path(step)
        part = target.with_name(f".{target.name}.tmp")
        what = f"cannot save step {step} to {self.folder}"
        tree, tensors = self._all.together(what, "", self._run.shared)
        parts = {name: repr(value) for name, value in tree["dict"].items()}
        parts |= {"the step": str(step), "shapes": repr(described(tensors))}
        self._all.check_equal(what, parts, _SAME)

        def do(action: Callable[[], Any]) -> Any:
            return self._all.together(what, _KEPT, action, _ROOM)

        with contextlib.ExitStack() as held:
            do(lambda: self._prepare(step, part, held))
            do(lambda: write_tensors(part / "tensors", tensors, self._all.group))
            own = own_file(part, self._all.rank)
            do(lambda: checkpoint.save(own, self._run.own(), {}))
            sums = do(lambda: sums_of(part, self._all.rank))
            manifest = {
                "step": step,
                "processes": self._all.count,
                "state": tree,
                "tensors": described(tensors),
                "files": self._all.files(sums),
            }
            do(lambda: self._publish(manifest, part, target))
            what = f"{self.folder}: cannot remove old checkpoints"
            do(self._remove_old)
        return target

    def load(self, step: int | None = None, *, reshard: bool = False) -> int | None:
        """Restore the last checkpoint, or that of ``step``; all processes must call it.

        Everything is read and checked before anything of the run is changed, which takes memory for
        a second copy of this process's part of the state.

        Args:
            step: None is the last one.
            reshard: take a checkpoint of another number of processes too. Weights, masks and
                optimiser are spread anew; counts are summed up on the first process, so reports
                over all of them go on; random generators stay as they are.

        Returns:
            The step it was saved with; None: there is no checkpoint yet.

        Raises:
            ValueError: it is damaged, of another model, or of another number of processes.
            OSError: there is none of ``step``, or it cannot be read. Nothing has changed then, on
                any process.
        """
        together, mine = self._all.together, self._all.rank
        known = together(f"cannot read {self.folder}", "repair it", self.steps)
        chosen = step if step is not None else known[-1] if known else None
        one = "all processes must see one folder"
        self._all.check_equal(f"cannot load {self.folder}", {"what is there": str(chosen)}, one)
        if chosen is None:
            return None
        path = self._path(chosen)
        hint = f"restore or delete {path.name}"
        if step is None and len(known) > 1:
            hint += f" to go on from step {known[-2]}"
        what = f"cannot load {path}"
        manifest = together(what, hint, lambda: read_manifest(path))
        saved = manifest["processes"]
        same = together(what, "", lambda: self._is_as_saved(saved, reshard))
        together(what, hint, lambda: check_files(path, manifest["files"], mine, self._all.count))
        together(what, hint, lambda: self._check_content(path, manifest))
        tensors = together(
            what,
            _OTHER,
            lambda: self._run.matching(manifest["state"], manifest["tensors"]),
        )
        new = zeros_like(tensors)
        together(what, hint, lambda: read_tensors(path / "tensors", new, self._all.group))
        ranks = range(mine, mine + 1) if same else range(saved)
        set_own = together(what, _OTHER, lambda: self._own_setter(path, ranks, same))
        self._run.apply_shared(rebuilt(manifest["state"], new))
        set_own()
        return int(manifest["step"])

    def _path(self, step: int) -> Path:
        if type(step) is not int or not 0 <= step < 10**18:
            raise ValueError(f"Checkpoints: a step must be a whole number from 0 on (got {step!r})")
        return self.folder / f"step-{step:09}"

    def _prepare(self, step: int, part: Path, held: contextlib.ExitStack) -> None:
        if self._all.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self.folder))
        if later := [known for known in self.steps() if known >= step]:
            there = self._path(later[-1]).name
            raise ValueError(f"there is {there} already; go on from it, or take another folder")
        if self._all.rank != 0:
            return
        held.callback(remove, part)
        for leftover in self.folder.glob(".step-*.tmp"):  # of a run that was killed
            remove(leftover)
        (part / "tensors").mkdir(parents=True)
        (part / "processes").mkdir()

    def _publish(self, manifest: Mapping[str, Any], part: Path, target: Path) -> None:
        if self._all.rank == 0:
            check_content(part, manifest["tensors"])
            publish(manifest, part, target)

    def _check_content(self, path: Path, manifest: Mapping[str, Any]) -> None:
        if self._all.rank == 0:
            check_content(path, manifest["tensors"])

    def _remove_old(self) -> None:
        if self._all.rank != 0:
            return
        for step in self.steps()[: -self.keep]:
            path = self._path(step)
            hidden = path.with_name(f".{path.name}.tmp")  # never a checkpoint with half its files
            os.rename(path, hidden)
            remove(hidden)

    def _is_as_saved(self, saved: int, reshard: bool) -> bool:
        """Whether there are as many processes as when it was saved."""
        if saved != self._all.count and not reshard:
            raise ValueError(
                f"it was saved by {saved} processes and this run has {self._all.count}; start as "
                "many, or pass reshard=True"
            )
        return saved == self._all.count

    def _own_setter(self, path: Path, ranks: range, same: bool) -> Callable[[], None]:
        parts = [checkpoint.load(own_file(path, rank))[0] for rank in ranks]
        return self._run.own_setter(parts, counts=same or self._all.rank == 0, random=same)
