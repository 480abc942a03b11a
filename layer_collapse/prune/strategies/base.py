"""What a pruning strategy sees and decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..masks import Masks


@dataclass(frozen=True)
class PrunableLayer:
    """A candidate: a layer that alone feeds a rectifier.

    Attributes:
        weight: name of the weight parameter.
        rectifier: name of the rectifier that it feeds.
        entropy: H over all neurons, in bits.
        entropy_active: H over the neurons that are not constant, in bits.
        alive: number of weights alive.
        mean_magnitude: mean |w| over the weights alive; 0 without one.
        fan_in: inputs per neuron.
        cap: how many of the alive weights may go in this round.
    """

    weight: str
    rectifier: str
    entropy: float
    entropy_active: float
    alive: int
    mean_magnitude: float
    fan_in: int
    cap: int


class Strategy(Protocol):
    """Decides how many weights each candidate loses; which ones is always smallest |w| first."""

    @property
    def name(self) -> str:
        """What the command line and reports call it."""
        ...

    def budget(self, layers: Sequence[PrunableLayer], total: int, masks: Masks) -> list[int]:
        """Weights to prune per layer: at most ``total`` together, each at most its cap."""
        ...
