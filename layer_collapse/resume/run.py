"""All that a training loop holds: what processes share, and what each has for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import with_prefix, without_prefix
from ..measure.tracker import EntropyTracker
from ..ops.rectify import HEADER, POSITIONS
from ..prune.masks import Masks
from ..sharding import is_sharded
from .generators import random_state, random_state_setter
from .tree import DTYPES, compared, described, flattened, rebuilt

__all__ = ["RunState"]

_COUNTS, _BUFFERS, _RANDOM = "counts/", "buffers/", "random/"


@dataclass
class RunState:
    """A run in parts; see :class:`~layer_collapse.resume.checkpoints.Checkpoints` for each."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    masks: Masks | None
    tracker: EntropyTracker | None
    others: Mapping[str, Any]

    def shared(self) -> tuple[Any, dict[str, Tensor]]:
        """What is spread over, or equal on, all processes: a tree and its tensors, not copied.

        Raises:
            ValueError: the optimiser has not stepped yet, something of ``others`` is not made of
                plain values and tensors, or a tensor has a dtype that cannot be saved.
        """
        fresh = not self.optimizer.state
        state = self._state()
        if fresh and self.optimizer.state:
            # Its steps would be one more than were taken.
            self._forget_steps()
            raise ValueError("the optimiser has no state yet; save after its first step")
        tensors: dict[str, Tensor] = {}
        tree = flattened("run", state, tensors)
        for name, (_, dtype) in described(tensors).items():
            if dtype not in DTYPES:
                known = ", ".join(DTYPES)
                raise ValueError(f"{name!r:.80} is {dtype}; expected {known}; convert it")
        return tree, tensors

    def matching(self, saved: Any, stored: Mapping[str, Any]) -> dict[str, Tensor]:
        """This run's tensors that a saved tree names, not copied.

        Args:
            saved: a tree of :meth:`shared`.
            stored: shapes and dtypes of its tensors, by name.

        Raises:
            ValueError: they are of another model, optimiser or masks; says in what.
        """
        names = {name: torch.empty(0, device="meta") for name in stored}
        content = rebuilt(saved, names)
        fresh = not self.optimizer.state
        state = self._state()
        if fresh:
            self._forget_steps()
        optimizer = content.get("optimizer") if isinstance(content, dict) else None
        stepped = optimizer.get("state") if isinstance(optimizer, dict) else None
        if not isinstance(stepped, dict):
            raise ValueError("the state is malformed")
        own = state["optimizer"]["state"]  # a parameter that had no gradient yet has no state
        state["optimizer"]["state"] = {name: own[name] for name in own if name in stepped}
        tensors: dict[str, Tensor] = {}
        compared("run", saved, flattened("run", state, tensors))
        return _alike(tensors, stored)

    def apply_shared(self, state: Mapping[str, Any]) -> None:
        """Take over what :func:`~layer_collapse.resume.tree.rebuilt` made of a matching tree."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        loose = StateDictOptions(strict=False)  # the buffers come apart; all else was compared
        set_model_state_dict(self.model, state["model"], options=loose)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=loose)
        if self.masks is not None:
            self.masks.load_state_dict(state["masks"])
        for name, other in self.others.items():
            other.load_state_dict(state["others"][name])

    def own(self) -> dict[str, Tensor]:
        """What every process has for itself: counts, plain buffers (batch norms), generators."""
        return with_prefix(_RANDOM, random_state()) | self._kept()

    def own_setter(
        self, saved: Sequence[Mapping[str, Tensor]], *, counts: bool, random: bool
    ) -> Callable[[], None]:
        """What takes over :meth:`own`, all of it checked before.

        Args:
            saved: of one process, or of several: then counts are summed, buffers are the first's.
            counts: whether to take over the counts; else they begin at zero.
            random: whether to take over the generators of the first.

        Raises:
            ValueError: it does not fit this run.
        """
        kept = self._kept()
        parts = [
            _alike(
                {name: tensor for name, tensor in part.items() if not name.startswith(_RANDOM)},
                described(kept),
            )
            for part in saved
        ]
        set_random = random_state_setter(without_prefix(_RANDOM, saved[0])) if random else None
        ledgers = [without_prefix(_COUNTS, part) for part in parts]

        def apply() -> None:
            if self.tracker is not None:
                self.tracker.load_state_dict(_summed(ledgers))
                if not counts:
                    self.tracker.reset()
            with torch.no_grad():
                for name, buffer in self._buffers(self._weights()).items():
                    buffer.copy_(parts[0][_BUFFERS + name])
            if set_random is not None:
                set_random()

        return apply

    def _forget_steps(self) -> None:
        """Undo that torch steps an optimiser without state, with zero gradients, to name it."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {}, "param_groups": groups})

    def _weights(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(self.model)

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        weights = self._weights()
        apart = self._buffers(weights)
        return {
            "model": {name: value for name, value in weights.items() if name not in apart},
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "masks": self.masks.state_dict() if self.masks is not None else None,
            "others": {name: other.state_dict() for name, other in self.others.items()},
        }

    def _buffers(self, weights: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those of ``weights`` that are plain buffers: they may differ between processes."""
        places = {buffer.data_ptr() for buffer in self.model.buffers() if not is_sharded(buffer)}
        plain = {n: t for n, t in weights.items() if isinstance(t, Tensor) and not is_sharded(t)}
        return {name: t for name, t in plain.items() if t.numel() and t.data_ptr() in places}

    def _kept(self) -> dict[str, Tensor]:
        counts = self.tracker.state_dict() if self.tracker is not None else {}
        buffers = self._buffers(self._weights())
        return with_prefix(_COUNTS, counts) | with_prefix(_BUFFERS, buffers)


def _alike(tensors: dict[str, Tensor], stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """``tensors`` if their names, shapes and dtypes are those of ``stored``."""
    own = described(tensors)
    if odd := sorted(own.keys() ^ stored.keys()):
        raise ValueError(f"{odd[0]!r:.80} is only in one of the checkpoint and this run")
    for name, here in own.items():
        if here != stored[name]:
            raise ValueError(f"{name!r:.80} is {stored[name]!s:.80} and not {here} as in this run")
    return tensors


def _summed(counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Ledgers with the positions and counts of all; the rest is the first's."""
    total = {name: ledger.clone() for name, ledger in counts[0].items()}
    for part in counts[1:]:
        for name, ledger in part.items():
            total[name][POSITIONS] += ledger[POSITIONS]
            total[name][HEADER:] += ledger[HEADER:]
    return total
