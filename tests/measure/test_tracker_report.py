"""The report of a tracked model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from tracking import (
    module,
    tracked_mlp,
)

from layer_collapse.measure.rectifiers import KINDS
from layer_collapse.measure.report import EntropyReport
from layer_collapse.measure.tracker import track


def test_report_rows() -> None:
    model, tracker = tracked_mlp(width=6, layers=2)
    rows = tracker.entropy()
    assert [(r.name, r.kind, r.feeding, r.neurons) for r in rows] == [
        ("act1", "relu", "fc1", 6),
        ("act2", "relu", "fc2", 6),
    ]
    assert [row.state for row in rows] == ["unmeasured"] * 2
    assert rows.zero_entropy == []
    assert rows["act1"].neuron_states is None
    with torch.no_grad():
        model.fc1.bias.copy_(torch.tensor([99.0, -99, 99, -99, 99, -99]))
    model(torch.randn(20, 1, 4, 4))
    report = tracker.entropy()
    assert len(report) == 2
    row = report["act1"]
    assert (row.state, row.on, row.off, row.mixed, row.entropy) == ("one-sided", 3, 3, 0, 0.0)
    assert row.positions == 20
    np.testing.assert_array_equal(row.neuron_states, [1, 2, 1, 2, 1, 2])
    assert row.zero_entropy
    assert not row.constant
    assert report.zero_entropy[0] == "act1"
    assert not report.cut
    with pytest.raises(KeyError, match="no rectifier is called 'act9'; this model has: act1, act2"):
        report["act9"]


def test_one_mixed_neuron_keeps_a_layer_from_zero_entropy() -> None:
    model, tracker = tracked_mlp(width=6, layers=1)
    with torch.no_grad():
        model.fc1.bias.copy_(torch.tensor([99.0, -99, 99, -99, 99, 0]))
    model(torch.randn(200, 1, 4, 4))
    row = tracker.entropy()["act1"]
    assert (row.state, row.mixed, row.zero_entropy) == ("mixed", 1, False)
    assert row.entropy == pytest.approx(row.entropy_active / 6)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_smooth_rectifiers_are_never_one_sided(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), module(KINDS[kind]), nn.Linear(6, 6))
    nn.init.constant_(model[0].bias, 99.0)
    with track(model) as tracker:
        model(torch.randn(9, 4))
        row = tracker.entropy()["1"]
        assert (row.on, row.state, row.zero_entropy, row.entropy) == (6, "mixed", False, 0.0)
        nn.init.zeros_(model[0].weight)
        assert tracker.entropy()["1"].state == "empty"


def test_nan_is_nonfinite_even_in_an_empty_layer() -> None:
    model, tracker = tracked_mlp(width=6, layers=1)
    nn.init.zeros_(model.fc1.weight)
    model(torch.full((2, 1, 4, 4), float("nan")))
    report = tracker.entropy()
    assert report["act1"].state == "nonfinite"
    assert report.zero_entropy == []
    assert json.loads(report.to_json())["rectifiers"][0]["entropy"] is None
    assert "nonfinite" in str(report)


def test_an_empty_layer_cuts_a_sequential_net_and_not_a_residual_one() -> None:
    straight, tracker = tracked_mlp(width=6, layers=2)
    nn.init.zeros_(straight.fc2.weight)
    straight(torch.randn(5, 1, 4, 4))
    report = tracker.entropy()
    assert report.cut
    assert report["act2"].state == "empty"
    assert "'act2' is constant and nothing leads around it" in report.cut_by
    assert report.zero_entropy == []
    assert "CUT: 'act2'" in str(report)

    around, tracker = tracked_mlp(name="resmlp", width=6, hidden=6, blocks=2)
    nn.init.zeros_(around.blocks[1].fc1.weight)
    around(torch.randn(5, 1, 4, 4))
    report = tracker.entropy()
    assert not report.cut
    assert report.cut_by == ""
    assert report["blocks.1.act"].state == "empty"
    assert report.zero_entropy == ["blocks.1.act"]


@pytest.mark.parametrize(("act", "cut"), [(nn.ReLU(), True), (nn.LeakyReLU(), False)])
def test_a_layer_that_is_always_off_cuts_where_off_is_flat(act: nn.Module, cut: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 6))
    nn.init.constant_(model[0].bias, -99.0)
    with track(model) as tracker:
        model(torch.randn(5, 4))
        report = tracker.entropy()
    assert report["1"].state == "one-sided"
    assert report.cut is cut


def test_report_as_json_and_text() -> None:
    model, tracker = tracked_mlp(name="vit", depth=2)
    for batch in (None, torch.randn(3, 1, 4, 4)):
        if batch is not None:
            model(batch)
        report = tracker.entropy()
        assert isinstance(report, EntropyReport)
        plain = json.loads(report.to_json())
        assert plain == report.to_dict()
        assert [row["name"] for row in plain["rectifiers"]] == [row.name for row in report]
        assert plain["certified"] is False
        text = str(report)
        assert len(text.splitlines()) == 2 + len(report)
        for row in report:
            assert row.name in text
            assert row.state in text
    assert repr(tracker) == "EntropyTracker(ViT, 2 rectifiers)"


def test_entropy_is_that_of_summed_counts() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    nn.init.ones_(model[0].weight)
    with track(model) as tracker:
        model(torch.ones(8, 1))
        assert tracker.entropy()["1"].entropy == 0
        model(-torch.ones(8, 1))
        assert tracker.entropy()["1"].entropy == 1.0  # the mean of the two batches is 0
