"""Fused counting against the forward hooks that people use today."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.cases import Layout, full, fused
from benchmarks.peers import EasierHook, EGPHook, SignHook, two_sided
from layer_collapse.measure.rectifiers import RELU

LAYOUTS = (
    Layout("nchw", (64, 64, 16, 16)),
    full(Layout("nchw", (128, 64, 32, 32))),
    full(Layout("channels_last", (64, 64, 16, 16))),
    full(Layout("channels_last", (128, 64, 32, 32))),
    Layout("tokens", (128, 65, 192)),
    full(Layout("tokens", (8, 128, 4096))),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_hooks(bench, layout):
    x = layout.sample()
    ours = fused(RELU, x, layout.channel_dim)
    hooks = {"hook_signs": SignHook, "hook_egp": EGPHook, "hook_easier": EasierHook}
    peers = {}
    for claim, hook in hooks.items():
        module, counting = nn.ReLU(), hook(layout.channel_dim)
        module.register_forward_hook(counting)
        assert torch.equal(module(x), torch.relu(x))
        dims = [dim for dim in range(x.dim()) if dim != layout.channel_dim % x.dim()]
        share = (x > 0).double().mean(dims)
        if claim == "hook_signs":
            assert torch.equal(counting.positive, (x > 0).sum(dims))
        else:
            assert counting.entropy == pytest.approx(two_sided(share).mean().item(), rel=1e-3)
        peers[claim] = partial(module, x)
    with torch.no_grad():
        bench(str(layout), ours(x), peers, x)
