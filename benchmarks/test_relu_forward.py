"""A rectifier that counts costs no more than torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.cases import KINDS, LARGE, MB, TORCH, TORCH_INPLACE, Layout, full, fused

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_SMALL = [
    ("nchw", (4, 64, 8, 8)),
    ("channels_last", (4, 64, 8, 8)),
    ("tokens", (4, 16, 256)),
    ("tokens", (4, 1, 4096)),
]
#: 64 KB, 256 KB, 1 MB and 2 MB of every layout.
SMALL = [
    layout if times in (1, 16) else full(layout)
    for name, shape in _SMALL
    for times in (1, 4, 16, 32)
    for layout in [Layout(name, (shape[0] * times, *shape[1:]))]
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("layout", LARGE, ids=str)
def test_large(bench, layout, kind, dtype):
    """Both sides allocate a fresh result in every call and free it right after, in this order."""
    x = layout.sample(DTYPES[dtype])
    assert x.nbytes >= 4 * MB
    ours, peer = fused(kind, x, layout.channel_dim), TORCH[kind.name]
    bench(f"{layout} {kind.name}", ours(x), {f"relu_{dtype}": partial(peer, x)}, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("layout", LARGE, ids=str)
def test_large_inplace(bench, layout, kind, dtype):
    """Both sides work on the same memory, refilled ahead of every call and outside the timing.

    After a first call there would be no negative value left: nothing to change for a kernel that
    skips what is rectified already, and no branch to mispredict. Networks bring fresh signs.
    """
    x = layout.sample(DTYPES[dtype])
    ours, peer = fused(kind, x, layout.channel_dim, inplace=True), TORCH_INPLACE[kind.name]
    buffer = x.clone()
    bench(
        f"{layout} {kind.name}",
        ours(buffer),
        {f"relu_{dtype}_inplace": partial(peer, buffer)},
        x,
        before=lambda: buffer.copy_(x),
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_small(bench, layout, kind):
    x = layout.sample()
    assert 64 * 1024 <= x.nbytes < 4 * MB
    ours, peer = fused(kind, x, layout.channel_dim), TORCH[kind.name]
    bench(f"{layout} {kind.name}", ours(x), {"relu_small": partial(peer, x)}, x)
