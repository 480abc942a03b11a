"""All ledgers of a model reduced in one call, and the live words of a forward."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import ALL_KINDS, call_of, sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import layer_collapse
from layer_collapse.measure.rectifiers import KINDS, RELU, RELU6, Kind
from layer_collapse.ops.entropy import (
    Column,
    layer_entropies,
    layer_entropies_reference,
    live_entropy,
)
from layer_collapse.ops.rectify import COUNT, FLAGS, LIVE, POSITIONS, new_ledger, rectify


@st.composite
def counted_ledgers(draw: st.DrawFn) -> tuple[list[Tensor], list[int]]:
    """Ledgers as forwards fill them: the counts of a neuron never exceed the positions."""
    ledgers, kinds = [], []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(ALL_KINDS))
        channels, positions = draw(st.integers(0, 9)), draw(st.integers(0, 6))
        ledger = new_ledger(kind, channels)
        values = draw(
            st.lists(
                st.sampled_from([-4.0, -1.0, 0.0, -0.0, 2.0, 7.0, math.inf, -math.inf, math.nan]),
                min_size=channels * positions,
                max_size=channels * positions,
            )
        )
        if channels and positions:
            rectify(call_of(kind, torch.tensor(values).view(positions, channels)), ledger, 1)
        ledgers.append(ledger)
        kinds.append(kind.code)
    return ledgers, kinds


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    # the device is the same for all examples
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=counted_ledgers())
def test_equals_the_twin(case: tuple[list[Tensor], list[int]], device: torch.device) -> None:
    ledgers, kinds = case
    ours = [t.cpu() for t in layer_entropies([ledger.to(device) for ledger in ledgers], kinds)]
    twin = layer_entropies_reference(ledgers, kinds)
    for mine, reference in zip(ours[:2], twin[:2], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-13, atol=1e-13, equal_nan=True)
    assert torch.equal(ours[2], twin[2])
    integers = [Column.POSITIONS, Column.ON, Column.OFF, Column.SATURATED, Column.MIXED]
    assert torch.equal(ours[0][:, integers], twin[0][:, integers])


def test_opcheck(device: torch.device) -> None:
    ledgers = [new_ledger(RELU, 3, device), new_ledger(RELU6, 5, device)]
    for kind, ledger, channels in zip((RELU, RELU6), ledgers, (3, 5), strict=True):
        x = sample(7, channels).nan_to_num().to(device)  # NaN != NaN
        rectify(call_of(kind, x), ledger, 1)
    torch.library.opcheck(
        torch.ops.layer_collapse.layer_entropies.default,
        (ledgers, [RELU.code, RELU6.code]),
    )


@pytest.mark.parametrize(
    ("ledgers", "kinds", "message"),
    [
        ([], [], "must hold at least one tensor"),
        ([new_ledger(RELU, 2)], [], r"one number per ledger \(got 0 for 1\)"),
        ([new_ledger(RELU, 2)], [8], r"kinds\[0\] must be 0 to 7 \(got 8\)"),
        ([new_ledger(RELU, 3)], [RELU6.code], r"ledgers\[0\] must be .* 6 \+ 4 \* C words"),
        ([new_ledger(RELU, 3).int()], [RELU.code], r"ledgers\[0\] must be contiguous int64"),
        ([new_ledger(RELU, 3)[:5]], [RELU.code], r"\(got Long with 5 words\)"),
    ],
)
def test_refuses(ledgers: list[Tensor], kinds: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        layer_entropies(ledgers, kinds)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.name)
def test_live_words_follow_every_forward(kind: Kind, device: torch.device) -> None:
    ledger = new_ledger(kind, 6, device)
    ledger[FLAGS] = COUNT | LIVE
    assert live_entropy(ledger) == (0.0, 0.0, 0)
    for _ in range(3):
        rectify(call_of(kind, 3 * sample(5, 6).to(device)), ledger, 1)
        row = layer_entropies([ledger], [kind.code])[0][0]
        live = live_entropy(ledger)
        assert live.mixed == row[Column.MIXED]
        assert live.entropy == row[Column.ENTROPY] or math.isnan(live.entropy)
        assert math.isnan(live.entropy) == math.isnan(row[Column.ENTROPY])
        assert math.isnan(live.entropy) or live.entropy_active == row[Column.ENTROPY_ACTIVE]


def test_live_words_stay_without_the_flag(device: torch.device) -> None:
    ledger = new_ledger(KINDS["relu"], 6, device)
    rectify(call_of(RELU, sample(5, 6).to(device)), ledger, 1)
    assert ledger[POSITIONS] == 5
    assert live_entropy(ledger) == (0.0, 0.0, 0)


def test_a_model_is_tracked_live() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU6())
    with layer_collapse.track(model, live=True) as tracker:
        model(torch.randn(32, 4))
        live, report = tracker.live(), tracker.entropy()
        assert set(live) == {row.name for row in report.rows}
        for row in report.rows:
            assert live[row.name] == (row.entropy, row.entropy_active, row.mixed)
            assert row.mixed > 0
        tracker.pause()
        model(torch.randn(32, 4))
        assert tracker.live() == live
        tracker.resume()
        model(torch.randn(32, 4))
        assert tracker.live() != live
        tracker.reset()
        assert set(tracker.live().values()) == {(0.0, 0.0, 0)}
    with (
        layer_collapse.track(model) as plain,
        pytest.raises(RuntimeError, match=r"track\(model, live=True\)"),
    ):
        plain.live()


def test_live_and_compiled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
    x = torch.randn(16, 4)
    with layer_collapse.track(model, live=True) as tracker:
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        compiled = tracker.live()
        tracker.reset()
        model(x)
        assert tracker.live() == compiled
