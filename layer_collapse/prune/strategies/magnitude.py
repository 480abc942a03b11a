"""Global magnitude: the smallest |w| over all candidates (iterative magnitude pruning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..masks import Masks
from .base import PrunableLayer


@dataclass(frozen=True)
class GlobalMagnitude:
    """The ``total`` smallest alive |w| over all candidates, ties by (layer, index).

    Where a cap binds, the layer stops at it and the rest comes from the others.
    """

    name: str = "magnitude"

    def budget(self, layers: Sequence[PrunableLayer], total: int, masks: Masks) -> list[int]:
        counts = dict.fromkeys((layer.weight for layer in layers), 0)
        open_layers = [layer for layer in layers if layer.cap > 0]
        left = min(total, sum(layer.cap for layer in open_layers))
        while open_layers and left > 0:
            shares = masks.shares(left, [layer.weight for layer in open_layers])
            over = [layer for layer in open_layers if shares[layer.weight] > layer.cap]
            if not over:
                counts.update(shares)
                break
            for layer in over:
                counts[layer.weight] = layer.cap
                left -= layer.cap
            open_layers = [layer for layer in open_layers if layer not in over]
        return [counts[layer.weight] for layer in layers]
