"""The CUDA rectifiers, run on the CPU, against the CPU ops: counts exact, values to rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import GEOMETRIES, Kernels
from helpers import ALL_KINDS, SLOPE, assert_same_bits, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rectify import DTYPES, LAYOUTS
from torch import Tensor

from layer_collapse.measure.rectifiers import KINDS, Kind
from layer_collapse.ops.rectify import COUNT, FLAGS, LIVE, LIVE_WORDS, new_ledger

CPU = torch.ops.layer_collapse
#: Units in the last place that float arithmetic may differ by (Hardswish has three roundings).
ULPS = 3


def arguments(kind: Kind, x: Tensor, channel_dim: int, slopes: int = 0) -> tuple:
    weight = None
    if kind.name == "prelu":
        count = slopes or x.shape[channel_dim]
        weight = torch.linspace(-0.5, 1.5, count, dtype=x.dtype)
    return kind.code, channel_dim, SLOPE if kind.name == "leaky_relu" else 0.0, weight


def check(
    kernels: Kernels,
    kind: Kind,
    x: Tensor,
    channel_dim: int,
    valid: Tensor | None = None,
    *,
    flags: int = COUNT | LIVE,
    slopes: int = 0,
    inplace: bool = False,
) -> None:
    """The kernels and the CPU op give the same y, counts and live words."""
    code, dim, slope, weight = arguments(kind, x, channel_dim, slopes)
    ledgers = [new_ledger(kind, x.shape[channel_dim]) for _ in range(2)]
    results = []
    for ops, ledger in zip((kernels.ops, CPU), ledgers, strict=True):
        ledger[FLAGS] = flags
        if inplace:
            y = x.clone()
            ops.rectify_(y, ledger, code, dim, slope, weight, valid)
        else:
            y = ops.rectify(x, ledger, code, dim, slope, weight, valid)
        results.append(y)
    got, expected = results
    if kind.name == "hardswish":
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert got.stride() == expected.stride()
        eps = torch.finfo(x.dtype).eps
        tiny = torch.finfo(x.dtype).tiny
        torch.testing.assert_close(got, expected, rtol=ULPS * eps, atol=tiny, equal_nan=True)
    else:
        assert_same_bits(got, expected)
    live = [ledger[LIVE_WORDS].clone() for ledger in ledgers]
    for ledger in ledgers:
        ledger[LIVE_WORDS] = 0
    assert torch.equal(*ledgers)
    assert live[0][2] == live[1][2]
    torch.testing.assert_close(
        live[0][:2].view(torch.float64),
        live[1][:2].view(torch.float64),
        rtol=1e-12,
        atol=1e-15,
        equal_nan=True,
    )


# Thousands of blocks: once, in test_large, is enough.
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "4099 channels of rows"])
@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_layouts(kernels: Kernels, kind: Kind, layout: str) -> None:
    make, channel_dim = LAYOUTS[layout]
    geometries = itertools.cycle(GEOMETRIES)
    for dtype in DTYPES:
        x = make(dtype)
        kernels.run_as(next(geometries))
        check(kernels, kind, x, channel_dim)
        positions = [s for d, s in enumerate(x.shape) if d != channel_dim % x.dim()]
        valid = torch.rand(positions) < 0.6
        check(kernels, kind, x, channel_dim, valid)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_alignments_and_tails(kernels: Kernels, kind: Kind, geometry: tuple[int, int]) -> None:
    """Every start within 16 bytes, rows of every length around one and several vectors."""
    kernels.run_as(geometry)
    for dtype in DTYPES:
        vector = 16 // dtype.itemsize
        for offset in range(vector):
            for inner in (2, vector - 1, vector, vector + 1, 5 * vector + 3, 70 * vector + 1):
                x = sample(2 * 3 * inner + vector, dtype=dtype)[offset : offset + 6 * inner]
                check(kernels, kind, x.view(2, 3, inner), 1, inplace=offset % 2 == 1)
            for channels in (1, vector, vector + 1, 3 * vector, 33 * vector):
                x = sample(5 * channels + vector, dtype=dtype)[offset : offset + 5 * channels]
                check(kernels, kind, x.view(5, channels), 1, inplace=offset % 2 == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(kernels: Kernels, dtype: torch.dtype) -> None:
    """More than a segment, several blocks per channel, many channels."""
    for geometry, shape in zip(
        GEOMETRIES,
        ((1, 2, 70001), (700, 2, 49), (2, 1030, 3), (2, 2, 32768), (2, 3, 9001)),
        strict=True,
    ):
        kernels.run_as(geometry)
        check(kernels, KINDS["relu"], sample(*shape, dtype=dtype), 1)
    for shape in ((9000, 8), (700, 300), (70, 1027)):
        x = sample(*shape, dtype=dtype)
        check(kernels, KINDS["relu6"], x, 1)
        check(kernels, KINDS["prelu"], x, 1, torch.rand(shape[0]) < 0.5)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_bfloat16_on_older_gpus(older_kernels: Kernels, kind: Kind) -> None:
    """What GPUs before sm_90 run, on every bfloat16 number, in both layouts."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for geometry in GEOMETRIES[:2]:
        older_kernels.run_as(geometry)
        check(older_kernels, kind, every.view(4, 16, 1024), 1)
        check(older_kernels, kind, every.view(1024, 64), 1)
        check(older_kernels, kind, every[1:].view(13107, 5), 1)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_every_half(kernels: Kernels, kind: Kind) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        kernels.run_as(GEOMETRIES[2])
        check(kernels, kind, every.view(4, 16, 1024), 1)
        check(kernels, kind, every.view(1024, 64), 1)


@pytest.mark.parametrize("flags", [0, COUNT, LIVE, COUNT | LIVE])
def test_flags_are_read_by_the_kernel(kernels: Kernels, flags: int) -> None:
    kernels.run_as(GEOMETRIES[0])
    for shape in ((4, 6, 5), (9, 6)):
        check(kernels, KINDS["relu"], sample(*shape), 1, flags=flags)


def test_one_slope_for_all_channels(kernels: Kernels) -> None:
    check(kernels, KINDS["prelu"], sample(4, 6, 5), 1, slopes=1)
    check(kernels, KINDS["prelu"], sample(9, 8), 1, slopes=1)


def test_counts_add_up_over_calls_and_orders(kernels: Kernels) -> None:
    """Any order of threads and blocks gives the same ledger, live words included, to the bit."""
    x = sample(3, 40, 77)
    ledgers = []
    for schedule in range(6):
        kernels.run_as((schedule, 256))
        ledger = new_ledger(KINDS["relu6"], 40)
        ledger[FLAGS] = COUNT | LIVE
        for _ in range(3):
            kernels.ops.rectify(x, ledger, KINDS["relu6"].code, 1, 0.0, None, None)
        ledgers.append(ledger)
    assert all(torch.equal(ledger, ledgers[0]) for ledger in ledgers)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape(kernels: Kernels, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = sample(*shape, dtype=dtype, seed=data.draw(st.integers(0, 3)))
    x = x.permute(data.draw(st.permutations(range(len(shape)))))
    if data.draw(st.booleans()):
        x = x[tuple(slice(data.draw(st.integers(0, 1)), None) for _ in shape)]
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    kind = data.draw(st.sampled_from(ALL_KINDS))
    positions = [s for d, s in enumerate(x.shape) if d != channel_dim % x.dim()]
    valid = torch.rand(positions) < 0.5 if data.draw(st.booleans()) else None
    kernels.run_as(data.draw(st.sampled_from(GEOMETRIES)))
    check(kernels, kind, x, channel_dim, valid)


@pytest.mark.parametrize("layers", [1, 7, 161])
def test_layer_entropies(kernels: Kernels, layers: int) -> None:
    generator = torch.Generator().manual_seed(layers)
    ledgers, kinds = [], []
    for i in range(layers):
        kind = ALL_KINDS[i % len(ALL_KINDS)]
        channels = (0, 1, 5, 300)[i % 4]
        ledger = new_ledger(kind, channels)
        if i % 5 != 4:  # the others have no position
            x = torch.randn(6, channels, generator=generator).round()
            if i % 3 == 0 and channels:
                x[:, 0] = torch.nan
            CPU.rectify(
                x, ledger, KINDS["relu"].code if kind.rows == 3 else kind.code, 1, 0.0, None, None
            )
        ledgers.append(ledger)
        kinds.append(kind.code)
    for geometry in GEOMETRIES:
        kernels.run_as(geometry)
        got = kernels.ops.layer_entropies(ledgers, kinds)
        expected = CPU.layer_entropies(ledgers, kinds)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 99}, "kind must be 0 to 7"),
        ({"channel_dim": 3}, "channel_dim must be a dim of x"),
        ({"ledger": torch.zeros(5, dtype=torch.int64)}, "ledger must be a contiguous int64 tensor"),
        ({"valid": torch.ones(4, 6, dtype=torch.bool)}, "valid must have the shape of x"),
        ({"weight": torch.ones(2)}, "weight belongs to PReLU"),
    ],
)
def test_bad_arguments_are_refused(kernels: Kernels, change: dict, message: str) -> None:
    given = {
        "x": torch.ones(4, 6, 5),
        "ledger": new_ledger(KINDS["relu"], 6),
        "kind": 0,
        "channel_dim": 1,
        "slope": 0.0,
        "weight": None,
        "valid": None,
    }
    with pytest.raises(RuntimeError, match=message):
        kernels.ops.rectify(*{**given, **change}.values())
