"""Rectifiers leave during one training run: watched, chosen, steered out one after another."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..graph import ExampleInputs, rectifier_nodes, trace
from ..measure.scan import Batch, scan
from ..measure.sites import find_sites
from ..measure.tracker import EntropyTracker, track
from ..prune.rounds import reset_dead_batch_norms
from .base import LINEARISED, ONE_SIDED, Outcome, Removed
from .choosing import Choice, lowest, ways_out
from .common import few, measurement
from .settings import FAMILIES, Settings, family_of
from .ways import AsConstant, Way

__all__ = ["Steering"]

_SAMPLES = 256  # for means and gates
_MEASUREMENTS = 20  # of the entropies over a run, besides those before each choice


def _silent(line: str) -> None:
    pass


class Steering:
    """Call it after every optimizer step, and layers leave while the network trains.

    ::

        steering = layer_collapse.removal.Steering(model, data, x, loss, remove=4)
        for step, (x, y) in enumerate(loader, 1):
            ...; optimizer.step(); schedule.step()
            steering(model, optimizer, step, total_steps)
        outcome = steering.finish()    # then layer_collapse.fold(outcome.model, x)

    The model is counted all along (:func:`layer_collapse.track`) and changed in place. Optimizer
    and learning-rate schedule are not touched: weights that are gone are zeroed again after every
    step while their layer leaves, and frozen once it has. The output always goes on depending on
    the input: a branch that would cut the network stays.

    Not known to it: copies of the model (averages of weights are to be made afterwards), weights
    spread over processes, and interruption: a run starts again from its beginning.

    Args:
        model: not tracked, not spread over processes; it may be wrapped by the caller.
        data: batches as for :func:`layer_collapse.scan`, re-iterable; all are scanned at the end,
            the first few hundred samples give means and gates.
        example_inputs: as for :func:`layer_collapse.track`.
        loss: loss of a model in evaluation mode on a few hundred fixed training samples.
        remove: how many rectifiers leave; fewer, with a note, where no more can.
        settings: see :class:`Settings`; by default those of the model's family.
        epochs: what the whole run amounts to, to date what happened.
        seed: of the random order.
        log: receives a line per removal.

    Raises:
        ValueError: no rectifier, no data or an iterator, or ``remove`` below 0.
        TraceError: the model cannot be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        example_inputs: ExampleInputs,
        loss: Callable[[nn.Module], float],
        *,
        remove: int,
        settings: Settings | None = None,
        epochs: float = 1.0,
        seed: int = 0,
        log: Callable[[str], None] = _silent,
    ) -> None:
        if remove < 0:
            raise ValueError(f"Steering: expected 0 or more rectifiers to remove (got {remove})")
        if iter(data) is data:
            raise ValueError(
                "Steering: expected data that can be iterated again (got an iterator); pass a list "
                "or a DataLoader"
            )
        self.model = model
        self.settings = settings or FAMILIES[family_of(model)]
        self.removed: list[Removed] = []
        self.history: list[dict[str, Any]] = []
        self.note = ""
        self._data, self._example, self._loss = data, example_inputs, loss
        self._few = few(data, _SAMPLES)
        self._remove, self._epochs, self._log = remove, epochs, log
        self._random = random.Random(seed)
        self._cut: list[str] = []  # exits of branches that left
        self._entropies: dict[str, float] = {}  # the last known, in bits
        # in loss, when last measured, by form
        self._costs: dict[str, dict[tuple[str, ...], float]] = {f: {} for f in self.settings.forms}
        self._leaving: Way | None = None
        self._began = self._until = 0.0
        self._done = remove == 0
        self._share = 0.0
        self._tracker: EntropyTracker | None = track(model, example_inputs)

    def __call__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total_steps: int
    ) -> None:
        """After the optimizer step number ``step`` of ``total_steps``, counted from 1."""
        before, self._share = self._share, step / total_steps
        if int(before * _MEASUREMENTS) != int(self._share * _MEASUREMENTS):
            self._measure()
        settings = self.settings
        part = (settings.end - settings.start) / max(1, self._remove)
        while not self._done or self._leaving is not None:
            if self._leaving is None:
                if self._share < settings.start + len(self.removed) * part:
                    return
                self._choose(part)
            else:
                passed, whole = self._share - self._began, self._until - self._began
                share = 1.0 if passed >= whole else passed / whole
                if settings.moves:
                    self._leaving.move(math.ceil(share * settings.moves) / settings.moves)
                if share < 1:
                    return
                self._end()

    def finish(self) -> Outcome:
        """Stop counting, scan, and hand out the network; not folded yet."""
        if self._leaving is not None:
            self.note += f"{', '.join(self._leaving.rectifiers)} left as the run ended. "
            self._end()
        missing = self._remove - len(self.removed)
        if missing and not self.note:
            self.note = f"the run ended before {missing} more had left"
        self._stop_counting()
        graph = trace(self.model, self._example)
        reset_dead_batch_norms(self.model, find_sites(graph))
        if rectifier_nodes(graph):
            report = scan(self.model, self._data, self._example)
            self.history.append(measurement(self._epochs, report, self.model))
            if report.cut:
                self.note += f"the network is cut: {report.cut_by}"
        return Outcome(self.model, self.removed, self._epochs, self.history, self.note.strip())

    def _stop_counting(self) -> None:
        if self._tracker is not None:
            self._tracker.remove()
        self._tracker = None

    def _measure(self) -> None:
        """Read the counts since the last time, if there are any."""
        if self._tracker is None:
            return
        gone = {one.name for one in self.removed}
        report = self._tracker.entropy()
        rows = tuple(row for row in report if row.name not in gone)
        if not any(row.positions for row in rows):
            return
        self._entropies |= {r.name: r.entropy for r in rows if math.isfinite(r.entropy)}
        epoch = self._share * self._epochs
        self.history.append(measurement(epoch, replace(report, rows=rows), self.model))
        self._tracker.reset()

    def _choose(self, part: float) -> None:
        """Start removing what has the lowest score, or note that nothing can leave."""
        self._measure()
        self._stop_counting()
        settings = self.settings
        choice = self._choice()
        if choice is not None:
            self._leaving, self._began = choice.way, self._share
            left = len(self.removed) + len(choice.way.rectifiers)
            self._until = settings.start + left * part if settings.moves else self._share
            self._log(f"{', '.join(choice.way.rectifiers)}: {choice.why}")
        else:
            self._done = True
            self.note += (
                f"{len(self.removed)} of {self._remove} left: no further branch has a way around "
                "it, or no rectifier can be replaced in place. "
            )
        if choice is not None or rectifier_nodes(trace(self.model, self._example)):
            self._tracker = track(self.model, self._example)
        if self._leaving is not None and settings.moves:
            self._leaving.begin(self.model)

    def _choice(self) -> Choice | None:
        """In the first form that costs little enough, else in the last that has anything."""
        settings, choice = self.settings, None
        for form in settings.forms:
            ways = ways_out(
                self.model,
                self._few,
                self._example,
                form=form,
                at_most=self._remove - len(self.removed),
                cut=self._cut,
                gone=[one.name for one in self.removed],
            )
            if not ways:
                continue
            choice = lowest(
                settings.score,
                ways,
                self.model,
                self._loss,
                self._entropies,
                self._random,
                self._costs[form],
            )
            if choice.growth <= settings.most:
                break
        return choice

    def _end(self) -> None:
        way = self._leaving
        assert way is not None
        way.end(self.model, self._few)
        if isinstance(way, AsConstant):
            self._cut.append(way.unit.exit)
        kind = way.kind
        if kind == LINEARISED and all(self._entropies.get(n) == 0 for n in way.rectifiers):
            kind = ONE_SIDED
        epoch = self._share * self._epochs
        self.removed += [Removed(name, kind, epoch) for name in way.rectifiers]
        self._leaving = None
        self._done = self._done or len(self.removed) >= self._remove
