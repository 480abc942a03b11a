"""Which weights are the smallest, without concatenating or sorting them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.cases import full
from benchmarks.peers import magnitudes
from layer_collapse import Masks

TENSORS, SIZE = 20, 1_000_000


@pytest.mark.parametrize("pruned", [full(0.0), 0.9], ids=["dense", "90 % pruned"])
def test_selection(bench, pruned):
    """Three quarters of the alive weights go; the peers see the pruned ones as zeros."""
    parameters = [nn.Parameter(torch.randn(SIZE)) for _ in range(TENSORS)]
    masks = Masks({str(i): p for i, p in enumerate(parameters)})
    masks.prune_({name: int(pruned * SIZE) for name in masks.names})
    gone = int(pruned * SIZE) * TENSORS
    k = (TENSORS * SIZE - gone) * 3 // 4

    def ours():
        return masks.shares(k)

    peers = {
        "selection_kthvalue": lambda: magnitudes(parameters).kthvalue(gone + k).values,
        "selection_topk": lambda: magnitudes(parameters).topk(gone + k, largest=False).values.max(),
    }
    if not bench.quick:
        peers["selection_sort"] = lambda: magnitudes(parameters).sort().values[gone + k - 1]
    bound = peers["selection_kthvalue"]()
    for peer in peers.values():
        assert peer() == bound
    # Random floats tie now and then: the bound itself may be shared by the weights on both sides.
    for name, share in ours().items():
        alive = parameters[int(name)].detach()[masks.bool_mask(name)].abs()
        assert (alive < bound).sum() <= share <= (alive <= bound).sum()
    assert sum(ours().values()) == k
    like = torch.empty(TENSORS, SIZE)
    bench("dense" if not pruned else "90 % pruned", ours, peers, like)
