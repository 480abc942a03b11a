"""Shapes at which the loops change: short planes, tiles of columns and what is left over."""

from __future__ import annotations

import torch
from helpers import INPLACE_KINDS, assert_same_bits, call_of, sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from layer_collapse.measure.rectifiers import KINDS, Kind
from layer_collapse.ops.rectify import counts_of, new_ledger, rectify, rectify_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Columns of one, two, ... nine blocks of 64 and the ends of blocks and tiles.
WIDTHS = (1, 63, 64, 65, 129, 192, 256, 257, 320, 448, 512, 513, 576, 577, 640, 1088, 4097)


def check(kind: Kind, x: Tensor, inplace: bool) -> None:
    ledger, reference = (new_ledger(kind, x.shape[1], x.device) for _ in range(2))
    plain = x.clone()
    expected = rectify_reference(call_of(kind, plain, 1, inplace), reference, 1)
    assert_same_bits(rectify(call_of(kind, x, 1, inplace), ledger, 1), expected)
    assert torch.equal(ledger, reference)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """[N, C, plane] with planes of 1 to 63 or up to five groups, or [N, C] of whole tiles."""
    if draw(st.booleans()):
        width = draw(st.sampled_from(WIDTHS))
        return draw(st.integers(1, max(2, min(600, 40000 // width)))), width
    plane = draw(st.one_of(st.integers(1, 63), st.integers(64, 330)))
    channels = draw(st.integers(1, 70))
    return draw(st.integers(1, max(2, min(300, 60000 // (plane * channels))))), channels, plane


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    # the device is the same for all examples
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=shapes(),
    kind=st.sampled_from(INPLACE_KINDS),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape(
    shape: tuple[int, ...],
    kind: Kind,
    dtype: torch.dtype,
    inplace: bool,
    ordered: bool,
    seed: int,
    device: torch.device,
) -> None:
    x = sample(*shape, dtype=dtype, seed=seed)
    if ordered:  # no NaN, but for one in some of the seeds
        x = torch.where(x.isnan(), torch.tensor(-0.0, dtype=dtype), x)
        if seed < 4:
            x.view(-1)[seed * x.numel() // 4] = float("nan") * (-1) ** seed
    check(kind, x.to(device), inplace)


def test_counters_of_a_byte_do_not_overflow(device: torch.device) -> None:
    """Every row of a batch counts in the same place, in more rows than a byte holds."""
    for shape in ((1000, 64), (1000, 513), (300, 8, 7), (2, 2, 64 * 255 + 1)):
        for value in (7.0, -7.0, float("nan")):
            for kind in (KINDS["relu"], KINDS["relu6"]):
                x = torch.full(shape, value, device=device)
                ledger = new_ledger(kind, shape[1], device)
                rectify(call_of(kind, x), ledger, 1)
                each = x.numel() // shape[1]
                row = {7.0: 0, -7.0: 1}.get(value, 2)
                counts = counts_of(ledger, kind)
                assert (counts[row] == each).all()
                above = kind.rows > 3 and value == 7.0
                assert counts.sum() == each * shape[1] * (2 if above else 1)
