"""Masked optimiser steps against torch's fused ones, exact selection against kthvalue."""

from __future__ import annotations

import pytest
import torch

from layer_collapse import MaskedAdamW, MaskedSGD, Masks
from layer_collapse.ops.magnitude import magnitude_shares

OPTIMIZERS = {
    "sgd": (
        lambda p, masks: MaskedSGD(p, 0.01, 0.9, weight_decay=1e-4, masks=masks),
        lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=1e-4, fused=True),
    ),
    "adamw": (
        lambda p, masks: MaskedAdamW(p, 1e-3, masks=masks),
        lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    ),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.95, 0.99])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(against, name, sparsity):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(1024, 1024)) for _ in range(4)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    masks = Masks({str(i): p for i, p in enumerate(ours)})
    masks.prune_({str(i): int(sparsity * p.numel()) for i, p in enumerate(ours)})
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    make_ours, make_theirs = OPTIMIZERS[name]
    mine, other = make_ours(ours, masks), make_theirs(theirs)
    mine.step(), other.step()
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        alive = masks.bool_mask(str(i))
        torch.testing.assert_close(p[alive], q[alive])
    against(mine.step, other.step, f"torch {name} fused")


def test_selection(against):
    torch.manual_seed(0)
    weights = torch.randn(4_000_000)
    k = 3_000_000
    shares = magnitude_shares([weights], [torch.empty(0, dtype=torch.int32)], k)
    assert shares.tolist() == [k]
    masks = Masks({"w": torch.nn.Parameter(weights)})
    words = masks.words("w")
    against(
        lambda: magnitude_shares([weights], [words], k),
        lambda: weights.abs().kthvalue(k),
        "kthvalue",
    )
