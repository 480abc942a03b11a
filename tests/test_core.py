"""Entropy, neuron states and budgets of the native core, against arithmetic done by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import ALL_KINDS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from layer_collapse._C import (
    build_info,
    entropy_budget,
    round_to_total,
)
from layer_collapse.measure.rectifiers import KINDS, Kind
from layer_collapse.ops.entropy import Column, State, layer_entropies
from layer_collapse.ops.rectify import HEADER, POSITIONS

RELU, RELU6, HARDSWISH = (KINDS[name].code for name in ("relu", "relu6", "hardswish"))
MIXED, ON, OFF, SATURATED, NONFINITE = State
ONE_SIGN = ("relu", "leaky_relu", "prelu")
SMOOTH = ("gelu", "gelu_tanh", "silu")


def table(*neurons: Sequence[int]) -> NDArray[np.int64]:
    """Counts [rows, C] from one (z > 0, z < 0, NaN, ...) per neuron."""
    return np.array(neurons, dtype=np.int64).T.copy()


def reduced(counts: NDArray[np.int64], positions: int, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    ledger = torch.cat([torch.zeros(HEADER, dtype=torch.int64), torch.tensor(counts).flatten()])
    ledger[POSITIONS] = positions
    return layer_entropies([ledger], [kind])


def neurons_from_counts(
    counts: NDArray[np.int64], positions: int, kind: int
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    _, bits, states = reduced(counts, positions, kind)
    return bits.numpy(), states.numpy()


def entropy_from_counts(counts: NDArray[np.int64], positions: int, kind: int) -> dict[str, float]:
    summary = reduced(counts, positions, kind)[0][0].tolist()
    named = {column.name.lower(): value for column, value in zip(Column, summary, strict=True)}
    return named | {"all": named["entropy"], "active": named["entropy_active"]}


def test_entropy_worked_by_hand() -> None:
    # p = 1/2: 1 bit; p = 1/4: 1/4 * 2 + 3/4 * log2(4/3) = 0.811278...; always positive: 0
    counts = table((4, 4, 0), (2, 6, 0), (8, 0, 0))
    bits, states = neurons_from_counts(counts, 8, RELU)
    quarter = 0.8112781244591328
    np.testing.assert_allclose(bits, [1.0, quarter, 0.0], rtol=1e-15)
    assert states.tolist() == [MIXED, MIXED, ON]
    layer = entropy_from_counts(counts, 8, RELU)
    assert layer["all"] == pytest.approx((1 + quarter) / 3, rel=1e-15)
    assert layer["active"] == pytest.approx((1 + quarter) / 2, rel=1e-15)
    assert (layer["on"], layer["off"], layer["mixed"]) == (1, 0, 2)


@pytest.mark.parametrize("name", ONE_SIGN)
def test_zeros_belong_to_both_sides(name: str) -> None:
    counts = table((3, 0, 0), (0, 3, 0), (0, 0, 0), (5, 0, 0), (0, 5, 0))
    bits, states = neurons_from_counts(counts, 5, KINDS[name].code)
    assert states.tolist() == [ON, OFF, OFF, ON, OFF]
    assert bits.tolist() == [0.0] * 5


def test_zeros_of_a_mixed_neuron_are_not_positive() -> None:
    bits, states = neurons_from_counts(table((1, 1, 0)), 4, RELU)  # and two zeros: p = 1/4
    assert bits[0] == pytest.approx(0.8112781244591328, rel=1e-15)
    assert states.tolist() == [MIXED]


def test_relu6_has_three_states() -> None:
    counts = table(
        (4, 2, 0, 2),  # 4 below, 2 between, 2 above of 8: 1/2 + 2 * 1/4 * 2 = 1.5 bits
        (8, 0, 0, 8),  # always above 6
        (8, 0, 0, 0),  # always between
        (0, 8, 0, 0),
        (7, 0, 0, 0),  # one zero: still linear
        (8, 0, 0, 4),  # two pieces, never negative: 1 bit
        (4, 0, 0, 4),  # zero and above
    )
    bits, states = neurons_from_counts(counts, 8, RELU6)
    assert states.tolist() == [MIXED, SATURATED, ON, OFF, ON, MIXED, MIXED]
    np.testing.assert_allclose(bits, [1.5, 0, 0, 0, 0, 1.0, 1.0], rtol=1e-15)
    layer = entropy_from_counts(counts, 8, RELU6)
    assert (layer["saturated"], layer["on"], layer["off"], layer["mixed"]) == (1, 2, 1, 3)


def test_hardswish_bends_at_minus_three_and_three() -> None:
    counts = table(
        (8, 0, 0, 0),  # never inside the bend
        (0, 8, 0, 0),
        (8, 0, 0, 1),  # always positive, once below 3: not linear
        (0, 8, 0, 1),
        (4, 4, 0, 0),  # both outer pieces
        (0, 0, 0, 8),  # always zero, which is inside
    )
    bits, states = neurons_from_counts(counts, 8, HARDSWISH)
    assert states.tolist() == [ON, OFF, MIXED, MIXED, MIXED, MIXED]
    np.testing.assert_allclose(bits, [0, 0, 0, 0, 1, 0], rtol=1e-15)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_one_nan_makes_the_neuron_and_the_layer_nonfinite(kind: Kind) -> None:
    rest = [0] * (kind.rows - 3)
    counts = table((7, 0, 1, *rest), (8, 0, 0, *rest))
    bits, states = neurons_from_counts(counts, 8, kind.code)
    assert states.tolist() == [NONFINITE, ON]
    assert math.isnan(bits[0])
    assert bits[1] == 0
    layer = entropy_from_counts(counts, 8, kind.code)
    assert math.isnan(layer["all"])
    assert math.isnan(layer["active"])
    assert (layer["nonfinite"], layer["on"]) == (1, 1)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_no_position_has_no_entropy_and_no_state(kind: Kind) -> None:
    counts = np.zeros((kind.rows, 3), dtype=np.int64)
    layer = entropy_from_counts(counts, 0, kind.code)
    assert math.isnan(layer["all"])
    assert math.isnan(layer["active"])
    assert sum(layer[key] for key in ("on", "off", "saturated", "mixed", "nonfinite")) == 0
    bits, states = neurons_from_counts(counts, 0, kind.code)
    assert not bits.any()
    assert not states.any()
    assert math.isnan(entropy_from_counts(counts[:, :0], 5, kind.code)["all"])


def test_summed_counts_are_not_the_mean_of_batches() -> None:
    # Two batches that are one-sided each, on opposite sides: the neuron is as mixed as can be.
    positive, negative = table((8, 0, 0)), table((0, 8, 0))
    alone = [entropy_from_counts(c, 8, RELU)["all"] for c in (positive, negative)]
    assert alone == [0.0, 0.0]
    assert entropy_from_counts(positive + negative, 16, RELU)["all"] == 1.0


def test_counts_beyond_32_bits() -> None:
    big = 2**40
    layer = entropy_from_counts(table((big, big, 0)), 2 * big, RELU)
    assert layer["all"] == 1.0
    # One sign in 2^40 is enough: the state is decided on integers, not on a rounded entropy.
    assert entropy_from_counts(table((big - 1, 1, 0)), big, RELU)["mixed"] == 1


@st.composite
def counted(draw: st.DrawFn) -> tuple[int, int, int]:
    positive = draw(st.integers(0, 10**12))
    negative = draw(st.integers(0, 10**12))
    positions = positive + negative + draw(st.integers(0, 10))
    assume(positions > 0)
    return positive, negative, positions


@settings(max_examples=200, deadline=None, derandomize=True)
@given(counted())
def test_entropy_is_the_formula(counts: tuple[int, int, int]) -> None:
    positive, negative, positions = counts
    bits, states = neurons_from_counts(table((positive, negative, 0)), positions, RELU)
    if positive == 0 or negative == 0:
        assert bits[0] == 0
        assert states[0] in (ON, OFF)
    else:
        p = positive / positions
        expected = -p * math.log2(p)
        if positions > positive:
            expected -= (1 - p) * math.log2(1 - p)
        assert bits[0] == pytest.approx(expected, abs=1e-9)
        assert states[0] == MIXED


# ---- budgets


def test_budget_worked_by_hand() -> None:
    """Two layers: I = H mean|w| = 0.5 * 0.4 = 0.2 and 0.25 * 0.4 = 0.1; sum I = 0.3.

    R = (0.3 / 0.2, 0.3 / 0.1) = (1.5, 3); softmax(R) = (e^-1.5, 1) / (1 + e^-1.5)
    = (0.18242552, 0.81757448); of 100: 18.242552 and 81.757448; floors 18 + 81 = 99, and the
    largest remainder, 0.757, takes the last one: 18 and 82.
    """
    assert entropy_budget([0.5, 0.25], [0.4, 0.4], [1000, 1000], 100) == [18, 82]


def test_budget_over_a_cap_worked_by_hand() -> None:
    """Three layers of mean|w| 1: I = (0.5, 0.25, 0.25), sum 1, R = (2, 4, 4).

    softmax = (e^-2, 1, 1) / (2 + e^-2) = (0.06337894, 0.46831053, 0.46831053); of 100: 6.338,
    46.831 and 46.831. The cap of the second is 10: it gets 10, and 90 are left for I = (0.5, 0.25):
    sum 0.75, R = (1.5, 3), shares 0.18242552 and 0.81757448; of 90: 16.418 and 73.582.
    Floors 16 + 73 = 89; the remainder 0.582 takes the last.
    """
    assert entropy_budget([0.5, 0.25, 0.25], [1, 1, 1], [99, 10, 99], 100) == [16, 10, 74]


def test_budget_overflows_until_nothing_is_left() -> None:
    assert entropy_budget([0.5, 0.25, 0.25], [1, 1, 1], [99, 10, 20], 100) == [70, 10, 20]
    assert entropy_budget([0.5, 0.25, 0.25], [1, 1, 1], [9, 10, 20], 100) == [9, 10, 20]


def test_layers_without_entropy_or_room_get_nothing_and_do_not_count() -> None:
    with_them = entropy_budget([0.5, 0, 0.25, 0.9], [0.4, 0.1, 0.4, 0.1], [99, 99, 99, 0], 100)
    without = entropy_budget([0.5, 0.25], [0.4, 0.4], [99, 99], 100)
    assert with_them == [without[0], 0, without[1], 0]
    assert entropy_budget([0, 0], [1, 1], [5, 5], 4) == [0, 0]
    assert entropy_budget([], [], [], 4) == []
    assert entropy_budget([1.0], [1.0], [5], 0) == [0]


def test_layers_of_zero_weights_go_first() -> None:
    assert entropy_budget([0.5, 0.5, 0.5], [0, 1, 0], [30, 90, 30], 50) == [25, 0, 25]
    assert entropy_budget([0.5, 0.5, 0.5], [0, 1, 0], [30, 90, 30], 70) == [30, 10, 30]


def test_shares_that_underflow_take_what_rounding_leaves() -> None:
    # R differs by about 10^6: the second share is exactly 0.
    assert entropy_budget([1e-6, 1.0], [1, 1], [7, 9], 7) == [7, 0]
    assert entropy_budget([1e-6, 1.0], [1, 1], [7, 9], 12) == [7, 5]


@pytest.mark.parametrize(
    ("entropy", "importance", "caps", "message"),
    [
        ([1.0], [1.0, 2.0], [1], "one entry per layer"),
        ([1.0, 1.0], [1.0], [1], "one entry per layer"),
        ([1.0, math.nan], [1.0, 1.0], [1, 1], "layer 1 must be finite"),
        ([1.0], [math.inf], [1], "layer 0 must be finite"),
        ([1.0], [-1.0], [1], "layer 0 must be"),
    ],
)
def test_wrong_budgets_are_named(
    entropy: list[float], importance: list[float], caps: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        entropy_budget(entropy, importance, caps, 1)


Layer = tuple[float, float, int]
layers = st.lists(
    st.tuples(
        st.one_of(st.just(0.0), st.floats(1e-9, 1.6)),
        st.one_of(st.just(0.0), st.floats(1e-9, 10.0)),
        st.integers(0, 10**9),
    ),
    max_size=9,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(layers=layers, zeta=st.floats(0, 1.2))
def test_budget_is_exact_and_within_caps(layers: list[Layer], zeta: float) -> None:
    entropy, importance, caps = (
        (list(column) for column in zip(*layers, strict=True)) if layers else ([], [], [])
    )
    total = round(zeta * sum(caps))
    counts = entropy_budget(entropy, importance, caps, total)
    room = sum(cap for h, cap in zip(entropy, caps, strict=True) if h > 0)
    assert sum(counts) == min(total, room)
    for count, cap, h in zip(counts, caps, entropy, strict=True):
        assert 0 <= count <= cap
        assert h > 0 or count == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layers=layers, zeta=st.floats(0, 1), data=st.data())
def test_budget_does_not_depend_on_the_order(
    layers: list[Layer], zeta: float, data: st.DataObject
) -> None:
    assume(layers)
    scores = [h * w for h, w, _ in layers if h > 0]
    assume(len(set(scores)) == len(scores))  # no ties but those of rounding
    order = data.draw(st.permutations(range(len(layers))))
    total = round(zeta * sum(cap for *_, cap in layers))

    def budget(of: Sequence[Layer]) -> list[int]:
        return entropy_budget(
            [h for h, *_ in of], [w for _, w, _ in of], [c for *_, c in of], total
        )

    plain, permuted = budget(layers), budget([layers[i] for i in order])
    for place, i in enumerate(order):  # a remainder may round the other way
        assert abs(permuted[place] - plain[i]) <= 1


def test_rounding_by_the_largest_remainder() -> None:
    assert round_to_total([1.5, 2.25, 3.25], [9, 9, 9], 7) == [2, 2, 3]
    assert round_to_total([1.5, 1.5, 1.0], [9, 9, 9], 4) == [2, 1, 1]  # a tie: the lower index
    assert round_to_total([2.9, 2.1], [2, 9], 5) == [2, 3]  # a full layer passes it on
    assert round_to_total([2.9, 2.1], [2, 2], 5) == [2, 2]  # no room
    assert round_to_total([0.0, 4.0], [9, 9], 6) == [0, 6]  # nothing wanted, nothing given
    assert round_to_total([], [], 3) == []
    with pytest.raises(ValueError, match="equal lengths"):
        round_to_total([1.0], [1, 2], 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=9),
    total=st.integers(0, 10**9),
    data=st.data(),
)
def test_rounding_is_exact(weights: list[int], total: int, data: st.DataObject) -> None:
    wanted = [w / sum(weights) * total for w in weights]
    caps = [data.draw(st.integers(math.ceil(w), 10**10)) for w in wanted]
    counts = round_to_total(wanted, caps, total)
    assert sum(counts) == total or total == 0
    for count, want, cap in zip(counts, wanted, caps, strict=True):
        assert math.floor(want) <= count <= cap
        assert abs(count - want) < 1 + 1e-6


def test_build_info_says_what_was_built() -> None:
    info = build_info()
    assert info["cxx_standard"] >= 202002
    assert info["cpu_capability"] in ("AVX-512", "AVX2", "baseline")
    assert info["torch_target"] == "2.10"
