"""What counting costs: a fused rectifier against the plain one and against a forward hook."""

from __future__ import annotations

import pytest
import torch

from layer_collapse.measure.rectifiers import RELU, Call
from layer_collapse.ops.rectify import counts_of, new_ledger, rectify, rectify_reference

SHAPES = {"4 MB": (64, 64, 16, 16), "25 MB": (32, 64, 56, 56), "tokens 6 MB": (64, 65, 384)}


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("peer", ["torch.relu", "hook (z > 0).sum"])
def test_relu(against, size, peer):
    x = torch.randn(SHAPES[size])
    dim = 1 if x.dim() == 4 else -1
    dims = [d for d in range(x.dim()) if d != dim % x.dim()]
    ledger, twin = new_ledger(RELU, x.shape[dim]), new_ledger(RELU, x.shape[dim])
    call = Call(RELU, x)
    assert torch.equal(rectify(call, ledger, dim), rectify_reference(call, twin, dim))
    assert torch.equal(counts_of(ledger, RELU), counts_of(twin, RELU))
    totals = torch.zeros(x.shape[dim], dtype=torch.int64)

    def hooked():
        totals.add_((x > 0).sum(dims))
        return torch.relu(x)

    against(
        lambda: rectify(call, ledger, dim),
        hooked if peer.startswith("hook") else lambda: torch.relu(x),
        peer,
    )
