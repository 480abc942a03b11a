"""Rectifiers leave during one training run: watched, chosen, steered out one after another."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..graph import ExampleInputs, rectifier_nodes, trace
from ..measure.report import EntropyReport
from ..measure.scan import Batch, scan
from ..measure.sites import Site, find_sites
from ..measure.tracker import EntropyTracker, track
from ..prune.rounds import reset_dead_batch_norms
from ..reduce.approximate import fit_gates
from .base import LINEARISED, ONE_SIDED, Outcome, Removed
from .common import few, measurement
from .units import find_units, swappable
from .ways import AsConstant, AsGate, Way, output_means

__all__ = ["SCORES", "Settings", "Steering"]

SCORES = ("loss x entropy", "loss", "entropy", "random")
FORMS = ("constant", "linear")
_SAMPLES = 256  # for means and gates
_MEASUREMENTS = 20  # of the entropies over a run, besides those before each choice


@dataclass(frozen=True)
class Settings:
    """How rectifiers leave during a run; everything that :class:`Steering` decides by.

    Attributes:
        score: the lowest leaves next. "loss": by how much the loss grows when it has left, 0 where
            it falls. "entropy": mean entropy of its neurons in bits over the last steps. "loss x
            entropy": their product. "random": any.
        forms: "constant": a branch becomes the mean of its output (see
            :mod:`layer_collapse.removal.units`); "linear": a rectifier becomes the affine gate that
            fits it best. In order of preference: the second where the first has nothing left.
        start, end: shares of the run between which rectifiers leave, each in its equal part.
        moves: in how many steps of equal size one leaves; 0: at once, at the start of its part.
    """

    score: str = "loss x entropy"
    forms: tuple[str, ...] = ("constant", "linear")
    start: float = 0.15
    end: float = 0.6
    moves: int = 10

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)} (got {self.score!r})")
        if not self.forms or set(self.forms) - set(FORMS):
            raise ValueError(f"forms must be some of {', '.join(FORMS)} (got {self.forms})")
        if not 0 <= self.start <= self.end <= 1 or self.moves < 0:
            raise ValueError(
                "expected 0 <= start <= end <= 1 and moves >= 0 (got "
                f"{self.start}, {self.end}, {self.moves})"
            )


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

    Args:
        model: not tracked, not spread over processes; it may be wrapped by the caller.
        data: batches as for :func:`layer_collapse.scan`, re-iterable; all are scanned at the end,
            the first few hundred samples give means and gates.
        example_inputs: as for :func:`layer_collapse.track`.
        loss: loss of a model in evaluation mode on a few hundred fixed training samples.
        remove: how many rectifiers leave; fewer, with a note, where no more can.
        settings: see :class:`Settings`.
        epochs: what the whole run amounts to, to date what happened.
        seed: of the random order.
        log: receives a line per removal.

    Raises:
        ValueError: no rectifier, no data, or ``remove`` below 0.
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
        self.model = model
        self.settings = settings or Settings()
        self.removed: list[Removed] = []
        self.history: list[dict[str, Any]] = []
        self.note = ""
        self._data, self._example, self._loss = data, example_inputs, loss
        self._few = few(data, _SAMPLES)
        self._remove, self._epochs, self._log = remove, epochs, log
        self._random = random.Random(seed)
        self._cut: list[str] = []  # exits of branches that left
        self._entropies: dict[str, float] = {}  # the last known, in bits
        self._sites: list[Site] = []
        self._leaving: Way | None = None
        self._began = self._takes = 0.0
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
                passed = self._share - self._began
                share = 1.0 if passed >= self._takes else passed / self._takes
                moved = math.ceil(share * settings.moves) / max(1, settings.moves)
                self._leaving.move(moved)
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

    def _measure(self) -> EntropyReport | None:
        """Read the counts since the last time, if there are any."""
        if self._tracker is None:
            return None
        report = self._tracker.entropy()
        if not any(row.positions for row in report):
            return None
        gone = {one.name for one in self.removed}
        rows = tuple(row for row in report if row.name not in gone)
        report = EntropyReport(rows)
        self._entropies |= {r.name: r.entropy for r in rows if math.isfinite(r.entropy)}
        epoch = self._share * self._epochs
        self.history.append(measurement(epoch, report, self.model))
        self._tracker.reset()
        return report

    def _choose(self, part: float) -> None:
        """Start removing what has the lowest score, or note that nothing can leave."""
        self._measure()
        self._stop_counting()
        ways = self._ways()
        if not ways:
            self._done = True
            self.note += (
                f"only {len(self.removed)} of {self._remove} left: no other branch has a way around "
                "it and no rectifier can be replaced in place. "
            )
        else:
            way, why = self._lowest(ways)
            self._leaving, self._began = way, self._share
            self._takes = part * len(way.rectifiers) if self.settings.moves else 0.0
            self._log(f"{', '.join(way.rectifiers)} leaves ({why})")
        graph = trace(self.model, self._example)
        if rectifier_nodes(graph):
            self._tracker = track(self.model, self._example)
        if self._leaving is not None and self.settings.moves:
            self._leaving.begin(self.model)

    def _end(self) -> None:
        way = self._leaving
        assert way is not None
        way.end(self.model, self._sites, self._few)
        if isinstance(way, AsConstant):
            self._cut.append(way.unit.exit)
        kind = way.kind
        if kind == LINEARISED and all(self._entropies.get(n) == 0 for n in way.rectifiers):
            kind = ONE_SIDED
        epoch = self._share * self._epochs
        self.removed += [Removed(name, kind, epoch) for name in way.rectifiers]
        self._leaving = None
        self._done = self._done or len(self.removed) >= self._remove

    def _ways(self) -> list[Way]:
        """What can leave now, by the first form that has anything."""
        graph = trace(self.model, self._example)
        self._sites = find_sites(graph)
        left = self._remove - len(self.removed)
        gone = {one.name for one in self.removed}
        for form in self.settings.forms:
            ways: list[Way] = []
            if form == "constant":
                units = find_units(graph, self._sites, self._cut)
                units = [unit for unit in units if len(unit.rectifiers) <= left]
                means = output_means(self.model, [u.exit for u in units], self._few)
                ways += [AsConstant(unit, means[unit.exit]) for unit in units]
            else:
                paths = {n: p for n, p in swappable(self._sites).items() if n not in gone}
                if paths:
                    fits = fit_gates(self.model, self._few, self._example, names=list(paths))
                    around = {site.name: site.way_around for site in self._sites}
                    ways += [
                        AsGate(name, path, fits[name].gate)
                        for name, path in paths.items()
                        if around[name] or not fits[name].gate.is_constant()
                    ]
            if ways:
                return ways
        return []

    def _lowest(self, ways: list[Way]) -> tuple[Way, str]:
        score = self.settings.score
        if score == "random":
            return self._random.choice(ways), "at random"
        entropies = [self._entropy(way) for way in ways]
        if score == "entropy":
            best = min(range(len(ways)), key=lambda i: entropies[i])
            return ways[best], f"H = {entropies[best]:.3f} bits"
        base = self._loss(self.model)
        costs = [self._loss_without(way.momentarily(self.model)) - base for way in ways]
        factors = [1.0] * len(ways) if score == "loss" else entropies

        def key(i: int) -> tuple[float, float]:
            return max(costs[i], 0.0) * factors[i], costs[i]

        best = min(range(len(ways)), key=key)
        return ways[best], f"loss {costs[best]:+.4f}, H = {entropies[best]:.3f} bits"

    def _entropy(self, way: Way) -> float:
        known = [self._entropies[n] for n in way.rectifiers if n in self._entropies]
        return sum(known) / len(known) if known else 1.0

    def _loss_without(self, left: AbstractContextManager[None]) -> float:
        with left:
            return self._loss(self.model)
