"""Which cells there are, and in which order: after any number of minutes the most telling ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ..removal import REMOVALS
from .cells import Cell
from .networks import NETWORKS, Sizes

__all__ = ["ARMS", "SHORT", "SUITES", "Budget", "budget_of", "cells", "copied"]

SUITES = {
    "cnn": ("resnet20", "efficientnet-lite0", "vgg-bn"),
    "vit": ("vit-relu", "vit-gelu"),
    "nlp": (
        "minilm-relu-trec",
        "minilm-relu-movies",
        "minilm-gelu-trec",
        "minilm-gelu-movies",
    ),
}
"""Networks of each family, the most telling first."""

ARMS = ("dense", "continuous", "drop", "entropy", "magnitude", "shallow")
"""What every network goes through, each after those that it builds on."""

SHORT = {"continuous-0.7": 0.7, "continuous-0.33": 0.33}
"""Runs of ``continuous`` on a part of the epochs, in which it shall reach what ``entropy`` reaches;
the shortest on the first network of each family alone."""

_LIKE = "continuous"  # whose architecture the shallow network has
_ABLATED = ("continuous-", "drop-")  # variants: on one network, where few leave and where many
_ORDER = ("continuous-loss", "continuous-random")  # these on the first network of each family
_LEADING = tuple(networks[0] for networks in SUITES.values())
_THOROUGH = "resnet20"  # where every other strategy runs
_EVERYWHERE = ("easier", "entropy-active")  # these once on the first network of each family
_SEEDS = 3


@dataclass(frozen=True)
class Budget:
    """What one network may cost.

    Attributes:
        counts: rectifiers to remove, the most telling first.
        epochs: of every arm.
        sizes: of the data.
    """

    counts: tuple[int, ...]
    epochs: float
    sizes: Sizes


_FULL: dict[str, tuple[tuple[int, ...], float]] = {
    "resnet20": ((5, 7, 3, 2), 8),
    "vgg-bn": ((2, 4), 8),
    "efficientnet-lite0": ((6, 10), 4),
    "vit-relu": ((4, 5, 2), 12),
    "vit-gelu": ((5, 7, 3), 12),
    "minilm-relu-trec": ((2, 4), 4),
    "minilm-relu-movies": ((2, 4), 3),
    "minilm-gelu-trec": ((2, 4), 4),
    "minilm-gelu-movies": ((2, 4), 3),
}
_QUICK = {
    "resnet20": Budget((3,), 3, Sizes(600, 300, 500, 28)),
    "vit-relu": Budget((3,), 6, Sizes(1000, 300, 500, 28)),
    "minilm-relu-trec": Budget((2,), 2, Sizes(160, 100, 200, 16)),
}


def budget_of(network: str, quick: bool) -> Budget:
    """The budget of a network; KeyError where the quick experiments leave it out."""
    if quick:
        return _QUICK[network]
    counts, epochs = _FULL[network]
    return Budget(counts, epochs, NETWORKS[network].sizes)


def cells(suite: str, quick: bool) -> list[Cell]:
    """All cells of a suite ("all": of all suites) in the order in which they are computed.

    First one network of each family at its first count with one seed; then, in turns, further
    seeds, counts and networks.

    Raises:
        ValueError: an unknown suite.
    """
    if suite != "all" and suite not in SUITES:
        raise ValueError(f"expected a suite among {', '.join(SUITES)}, all (got {suite!r})")
    families = SUITES.values() if suite == "all" else [SUITES[suite]]
    ranked: list[tuple[tuple[int, ...], Cell]] = []
    for networks in families:
        for rank, name in enumerate(networks):
            if quick and name not in _QUICK:
                continue
            for more, cell in _cells_of(name, quick):
                ranked.append(((rank + more, cell.seed, rank), cell))
    ranked.sort(key=lambda pair: pair[0])  # stable: arms stay in their order
    return [cell for _, cell in ranked]


def _cells_of(name: str, quick: bool) -> list[tuple[int, Cell]]:
    """A network's cells, each with how many steps away from the first seed and count it is."""
    budget = budget_of(name, quick)
    settings = {"epochs": budget.epochs, "sizes": asdict(budget.sizes)}
    found = []
    for seed in range(1 if quick else _SEEDS):
        for number, count in enumerate(budget.counts):
            for arm in ARMS:
                if arm == "dense" and number:
                    continue
                own = settings | ({"like": _LIKE} if arm == "shallow" else {})
                remove = 0 if arm == "dense" else count
                found.append((seed + number, Cell(name, arm, remove, seed, own)))
        if not quick:
            for arm, part in SHORT.items() if name in _LEADING else list(SHORT.items())[:1]:
                short = settings | {"epochs": part * budget.epochs, "strategy": "continuous"}
                found.append((seed + 1, Cell(name, arm, budget.counts[0], seed, short)))
    ablations = [arm for arm in REMOVALS if arm.startswith(_ABLATED)]
    if not quick and name in _LEADING:
        counts = budget.counts[: 2 if name == _THOROUGH else 1]
        found += [
            (seed + 1 + number, Cell(name, arm, count, seed, settings))
            for seed in range(_SEEDS)
            for number, count in enumerate(counts)
            for arm in (ablations if name == _THOROUGH else _ORDER)
        ]
    if not quick and name in _LEADING:
        others = [arm for arm in REMOVALS if arm not in (*ARMS, *ablations)]
        found += [
            (seed + 1, Cell(name, arm, budget.counts[0], seed, settings))
            for seed in range(_SEEDS if name == _THOROUGH else 1)
            for arm in (others if name == _THOROUGH else _EVERYWHERE)
        ]
    return found


def copied(cell: Cell) -> Cell:
    """The cell whose architecture a shallow cell has."""
    settings = dict(cell.settings)
    return replace(cell, arm=settings.pop("like"), settings=settings)
