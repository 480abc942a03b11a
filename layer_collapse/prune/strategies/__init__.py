"""How many weights each layer loses in a round. A new strategy is one file and one entry below."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .base import PrunableLayer, Strategy
from .entropy import EntropyGuided
from .magnitude import GlobalMagnitude
from .uniform import UniformMagnitude

STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "entropy": EntropyGuided,
    "magnitude": GlobalMagnitude,
    "uniform": UniformMagnitude,
}


def strategy(choice: str | Strategy) -> Strategy:
    """A strategy by name, or the given one.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in STRATEGIES:
        raise ValueError(f"unknown strategy {choice!r}; choose from {', '.join(STRATEGIES)}")
    return STRATEGIES[choice]()


__all__ = [
    "STRATEGIES",
    "EntropyGuided",
    "GlobalMagnitude",
    "PrunableLayer",
    "Strategy",
    "UniformMagnitude",
    "strategy",
]
