"""Overhead against tensor size, the points of overhead.svg; no bars."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.cases import MB, fused
from layer_collapse.measure.rectifiers import RELU

CHANNELS = 64
SIZES = [4096 * 4**i for i in range(8)]  # bytes: 4 KB to 64 MB
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
pytestmark = pytest.mark.full


def sample(size: int, dtype: torch.dtype) -> torch.Tensor:
    """NCHW of 64 channels and ``size`` bytes; planes of 16 x 16 where they fit, else smaller."""
    values = size // dtype.itemsize // CHANNELS
    side = max(side for side in (4, 8, 16) if side * side <= values)
    return torch.randn(values // side**2, CHANNELS, side, side, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_overhead(bench, size, dtype):
    x = sample(size, DTYPES[dtype])
    assert x.nbytes == size
    ours = fused(RELU, x, 1)
    bench(f"{dtype} {size >> 10} KB", ours(x), {"overhead": partial(torch.relu, x)}, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_overhead_inplace(bench, size, dtype):
    """Small tensors come in a pool that is refilled at once, so that a round is worth timing."""
    x = sample(size, DTYPES[dtype])
    ours = fused(RELU, x, 1, inplace=True)
    source = x.expand(max(1, min(64, MB // size)), *x.shape)
    pool = source.clone()
    bench(
        f"{dtype} {size >> 10} KB",
        all_of([ours(buffer) for buffer in pool]),
        {"overhead_inplace": all_of([partial(torch.relu_, buffer) for buffer in pool])},
        x,
        before=lambda: pool.copy_(source),
        calls=len(pool),
    )


def all_of(calls):
    def run():
        for call in calls:
            call()

    return run
