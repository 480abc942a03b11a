"""What can leave a network now, and what of it costs the least."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..graph import ExampleInputs, trace
from ..measure.scan import Batch
from ..measure.sites import find_sites
from ..reduce.approximate import fit_gates
from .common import few
from .units import find_units, swappable
from .ways import AsConstant, AsGate, Way, output_means

__all__ = ["Choice", "lowest", "ways_out"]

_GATE_SAMPLES = 64


@dataclass(frozen=True)
class Choice:
    """What leaves next.

    Attributes:
        growth: of the loss when it has left, as a share of what the loss is.
        why: in words.
    """

    way: Way
    growth: float
    why: str


def ways_out(
    model: nn.Module,
    data: Sequence[Batch],
    example_inputs: ExampleInputs,
    *,
    form: str,
    at_most: int,
    cut: Collection[str] = (),
    gone: Collection[str] = (),
) -> Sequence[Way]:
    """What can leave in one of :data:`~layer_collapse.removal.settings.FORMS`.

    Args:
        model: not tracked; it stays as it is.
        data: a few batches, for means and gates.
        at_most: so many rectifiers may leave together.
        cut: exits that are constant already.
        gone: rectifiers that have left but still stand in the graph.
    """
    graph = trace(model, example_inputs)
    sites = find_sites(graph)
    if form == "constant":
        units = [u for u in find_units(graph, sites, cut) if len(u.rectifiers) <= at_most]
        means = output_means(model, [u.exit for u in units], data) if units else {}
        return [AsConstant(unit, means[unit.exit]) for unit in units]
    paths = {name: path for name, path in swappable(sites).items() if name not in gone}
    if not paths:
        return []
    some = few(data, _GATE_SAMPLES)  # two numbers per neuron need few
    fits = fit_gates(model, some, example_inputs, names=list(paths))
    around = {site.name: site.way_around for site in sites}
    return [
        AsGate(name, path, fits[name].gate)
        for name, path in paths.items()
        if around[name] or not fits[name].gate.is_constant()
    ]


def lowest(
    score: str,
    ways: Sequence[Way],
    model: nn.Module,
    loss: Callable[[nn.Module], float],
    entropies: Mapping[str, float],
    chance: random.Random,
    costs: dict[tuple[str, ...], float],
) -> Choice:
    """What leaves next.

    Lazily greedy (Minoux 1978): those that looked cheapest at earlier choices are measured first,
    until one costs no more than what the next cost then. That is the cheapest of all where costs
    only grow as others leave, for a fraction of the evaluations.

    Args:
        score: as :attr:`Settings.score`.
        loss: of a model in evaluation mode.
        entropies: by rectifier, in bits; one that is not known counts as 1.
        costs: growth of the loss by the rectifiers of a way, as last measured; brought up to date.

    Raises:
        ValueError: a loss is not finite.
    """
    base = loss(model)

    def measure(way: Way) -> None:
        with way.momentarily(model):
            costs[way.rectifiers] = loss(model) - base
        if not math.isfinite(costs[way.rectifiers]):
            raise ValueError("the loss is not finite; the training has diverged")

    bits = {way: _mean([entropies[n] for n in way.rectifiers if n in entropies]) for way in ways}
    if score == "random":
        best = chance.choice(list(ways))
        measure(best)
    elif score == "entropy":
        best = min(ways, key=lambda way: bits[way])
        measure(best)
    else:

        def key(way: Way) -> tuple[float, float]:
            cost = costs.get(way.rectifiers, -math.inf)
            # of those whose leaving costs nothing, the one that the loss gains most by
            return max(cost, 0.0) * (bits[way] if score == "loss x entropy" else 1.0), cost

        measured: list[Way] = []
        for way in sorted(ways, key=key):
            if measured and min(map(key, measured)) <= key(way):
                break
            measure(way)
            measured.append(way)
        best = min(measured, key=key)
    cost = costs[best.rectifiers]
    growth = cost / abs(base) if base else math.copysign(math.inf, cost) if cost else 0.0
    return Choice(best, growth, f"{best.kind}, loss {cost:+.4f}, H = {bits[best]:.3f} bits")


def _mean(known: list[float]) -> float:
    return sum(known) / len(known) if known else 1.0
