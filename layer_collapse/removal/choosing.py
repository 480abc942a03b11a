"""What can leave a network now, and what of it costs the least."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import nn

from ..graph import ExampleInputs, trace
from ..measure.scan import Batch
from ..measure.sites import find_sites
from ..reduce.approximate import fit_gates
from .units import find_units, swappable
from .ways import AsConstant, AsGate, Way, output_means

__all__ = ["lowest", "ways_out"]


def ways_out(
    model: nn.Module,
    data: Sequence[Batch],
    example_inputs: ExampleInputs,
    *,
    forms: Sequence[str],
    at_most: int,
    cut: Collection[str] = (),
    gone: Collection[str] = (),
) -> list[Way]:
    """What can leave, by the first of ``forms`` that has anything.

    Args:
        model: not tracked; it stays as it is.
        data: a few batches, for means and gates.
        at_most: so many rectifiers may leave together.
        cut: exits that are constant already.
        gone: rectifiers that have left but still stand in the graph.
    """
    graph = trace(model, example_inputs)
    sites = find_sites(graph)
    for form in forms:
        ways: list[Way] = []
        if form == "constant":
            units = [u for u in find_units(graph, sites, cut) if len(u.rectifiers) <= at_most]
            means = output_means(model, [u.exit for u in units], data) if units else {}
            ways += [AsConstant(unit, means[unit.exit]) for unit in units]
        else:
            paths = {name: path for name, path in swappable(sites).items() if name not in gone}
            fits = fit_gates(model, data, example_inputs, names=list(paths)) if paths else {}
            around = {site.name: site.way_around for site in sites}
            ways += [
                AsGate(name, path, fits[name].gate)
                for name, path in paths.items()
                if around[name] or not fits[name].gate.is_constant()
            ]
        if ways:
            return ways
    return []


def lowest(
    score: str,
    ways: Sequence[Way],
    model: nn.Module,
    loss: Callable[[nn.Module], float],
    entropies: Mapping[str, float],
    chance: random.Random,
) -> tuple[Way, str]:
    """What leaves next, and why in words.

    Args:
        score: as :attr:`Settings.score`.
        loss: of a model in evaluation mode; called once per way where the score needs it.
        entropies: by rectifier, in bits; one that is not known counts as 1.
    """
    if score == "random":
        return chance.choice(list(ways)), "at random"
    bits = [_mean([entropies[n] for n in way.rectifiers if n in entropies]) for way in ways]
    costs = [0.0] * len(ways)
    if score != "entropy":
        base = loss(model)
        costs = [_without(way.momentarily(model), model, loss) - base for way in ways]
    if not all(map(math.isfinite, costs)):
        raise ValueError("the loss is not finite; the training has diverged")

    def key(i: int) -> tuple[float, float]:
        if score == "entropy":
            return bits[i], 0.0
        # of those whose leaving costs nothing, the one that the loss gains most by
        return max(costs[i], 0.0) * (bits[i] if score == "loss x entropy" else 1.0), costs[i]

    best = min(range(len(ways)), key=key)
    why = f"H = {bits[best]:.3f} bits"
    return ways[best], why if score == "entropy" else f"loss {costs[best]:+.4f}, {why}"


def _mean(known: list[float]) -> float:
    return sum(known) / len(known) if known else 1.0


def _without(
    left: AbstractContextManager[None], model: nn.Module, loss: Callable[[nn.Module], float]
) -> float:
    with left:
        return loss(model)
