"""Fused counting beats relu and sum fused by torch.compile."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.cases import MB, Layout, full, fused
from benchmarks.peers import compiled_relu_and_sum
from layer_collapse.measure.rectifiers import RELU

LAYOUTS = (
    full(Layout("nchw", (16, 64, 8, 8))),
    Layout("nchw", (64, 64, 16, 16)),
    full(Layout("channels_last", (64, 64, 16, 16))),
    Layout("tokens", (16, 64, 256)),
    full(Layout("tokens", (16, 64, 1024))),
    Layout("nchw", (128, 64, 32, 32)),
    full(Layout("channels_last", (128, 64, 32, 32))),
    full(Layout("tokens", (128, 64, 1024))),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_compile(bench, layout):
    x = layout.sample()
    claim = "compile_small" if x.nbytes <= 4 * MB else "compile_large"
    ours = fused(RELU, x, layout.channel_dim)
    compiled = compiled_relu_and_sum(layout.channel_dim)
    y, positive = compiled(x)
    dims = [dim for dim in range(x.dim()) if dim != layout.channel_dim % x.dim()]
    assert torch.equal(y, torch.relu(x))
    assert torch.equal(positive, (x > 0).sum(dims))
    bench(str(layout), ours(x), {claim: partial(compiled, x)}, x)
