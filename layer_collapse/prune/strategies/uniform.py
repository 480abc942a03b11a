"""Uniform magnitude: the same fraction of every candidate, smallest |w| first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ... import _C
from ..masks import Masks
from .base import PrunableLayer


@dataclass(frozen=True)
class UniformMagnitude:
    """Every candidate loses the same share of its alive weights."""

    name: str = "uniform"

    def budget(self, layers: Sequence[PrunableLayer], total: int, masks: Masks) -> list[int]:
        alive = sum(layer.alive for layer in layers)
        wanted = [total * layer.alive / alive if alive else 0.0 for layer in layers]
        return _C.round_to_total(wanted, [layer.cap for layer in layers], total)
