"""Which weights of a layer are zero, found some rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..graph import BATCH_NORM, WEIGHTED
from .float64 import blocks
from .gate import AffineGate
from .layers import per_row, stored_weight


def constant_rows(module: nn.Module, live: Tensor | None = None) -> Tensor:
    """[C] bool: channels of a Linear or Conv whose weights are all zero.

    Args:
        live: [in] bool, columns that count; by default all of them.
    """
    weight = stored_weight(module)
    found = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    for rows in blocks(weight):  # torch reduces through bools, of a large weight too many at once
        used = weight[rows].flatten(2).any(dim=2) if weight.ndim > 2 else weight[rows] != 0
        if live is not None:
            used = used & per_row(live.to(weight.device), module)[rows]
        found[rows] = ~used.any(dim=1)
    return found


def unread(module: nn.Module) -> Tensor:
    """[in] bool: columns of a Linear or Conv that are zero."""
    weight, groups = stored_weight(module), int(getattr(module, "groups", 1))
    shape = len(weight) // groups, weight.shape[1], math.prod(weight.shape[2:])
    per_group = weight.reshape(groups, *shape)
    if groups > 1:
        return ~per_group.any(dim=1).any(dim=2).flatten()
    used = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    for rows in blocks(weight):  # as for constant_rows
        used |= per_group[0, rows].any(dim=0).any(dim=1)
    return ~used


def is_constant(module: nn.Module) -> bool:
    """Whether a layer gives the same whatever it reads: no weight is left in it."""
    if type(module) is AffineGate:
        return module.is_constant()
    if type(module) in (*WEIGHTED, *BATCH_NORM, nn.LayerNorm):
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.numel() == 0 or bool(weight[0].any()):
            return False  # most layers have a weight in their first row: no need to read them all
        return not any(bool(weight[rows].any()) for rows in blocks(weight))
    return False
