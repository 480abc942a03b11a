"""How rectifiers leave a network. A new strategy is one file and one entry below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ..prune.strategies import EntropyGuided, GlobalMagnitude, UniformMagnitude
from .base import Loop, NotApplicable, Outcome, Removal, Removed, Watch
from .continuous import Continuous
from .drop import Drop
from .easier import Easier
from .pruned import Pruned
from .settings import Settings
from .steering import Steering
from .tlc import Tlc

REMOVALS: Mapping[str, Callable[[], Removal]] = {
    "entropy": Pruned,
    "entropy-active": partial(Pruned, EntropyGuided("active"), name="entropy-active"),
    "magnitude": partial(Pruned, GlobalMagnitude()),
    "uniform": partial(Pruned, UniformMagnitude()),
    "drop": Drop,
    "drop-linear": partial(Drop, ("linear",)),
    "continuous": Continuous,
    "continuous-loss": partial(Continuous, score="loss"),
    "continuous-entropy": partial(Continuous, score="entropy"),
    "continuous-random": partial(Continuous, score="random"),
    "continuous-constant": partial(Continuous, forms=("constant",)),
    "continuous-linear": partial(Continuous, forms=("linear",)),
    "continuous-once": partial(Continuous, at_once=True),
    "easier": Easier,
    "tlc": Tlc,
}

__all__ = [
    "REMOVALS",
    "Loop",
    "NotApplicable",
    "Outcome",
    "Removal",
    "Removed",
    "Settings",
    "Steering",
    "Watch",
]
