"""Entropy-guided budget: sparsity goes to the layers that use their rectifier least.

Liao, Quétu, Nguyen, Tartaglione, TMLR 2026 (NEPENTHE), after EGP (ICCVW 2023, arXiv 2308.06619).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ... import _C
from ..masks import Masks
from .base import PrunableLayer


@dataclass(frozen=True)
class EntropyGuided:
    """k_l = softmax(R)_l total with R_l = sum_j I_j / I_l and I_l = H_l mean|w|_l.

    Deviations from the authors' code: entropies come from summed counts, and the counts k_l are
    rounded to the exact total by largest remainders where the authors truncate each.

    Attributes:
        mean: which layer entropy H_l is: over "all" neurons, or over the "active" ones (EGP code).
        fan_in_normalised: multiply mean|w| by sqrt(fan-in), so that a layer is not pruned first for
            having many inputs and hence small weights.
    """

    mean: str = "all"
    fan_in_normalised: bool = False
    name: str = "entropy"

    def __post_init__(self) -> None:
        if self.mean not in ("all", "active"):
            raise ValueError(f"mean must be 'all' or 'active' (got {self.mean!r})")

    def budget(self, layers: Sequence[PrunableLayer], total: int, masks: Masks) -> list[int]:
        entropies = [
            layer.entropy if self.mean == "all" else layer.entropy_active for layer in layers
        ]
        importances = [
            layer.mean_magnitude * (math.sqrt(layer.fan_in) if self.fan_in_normalised else 1.0)
            for layer in layers
        ]
        return _C.entropy_budget(entropies, importances, [layer.cap for layer in layers], total)
