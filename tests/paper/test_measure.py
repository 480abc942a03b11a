"""What is measured of a cell, on a network small enough to know the answers."""

from __future__ import annotations

import torch
from torch import nn

from layer_collapse.files import to_json
from layer_collapse.models import build
from layer_collapse.paper.loops import Part, TrainingLoop
from layer_collapse.paper.measure import measure
from layer_collapse.removal import Outcome
from layer_collapse.training import Recipe


def _setting() -> tuple[nn.Module, TrainingLoop, Part]:
    x = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    part = Part(x, (x[:, 0, 0, 0] > 0).long())
    loop = TrainingLoop(part, part, Recipe(lr=0.05, batch=20))
    torch.manual_seed(0)
    model = build("resmlp", (1, 4, 4), 2, width=8, hidden=8, blocks=3)
    loop.train(model, 3)
    return model, loop, part


def test_an_empty_layer_leaves_and_no_prediction_changes() -> None:
    model, loop, part = _setting()
    nn.init.zeros_(model.get_parameter("blocks.1.fc1.weight"))
    found = measure(Outcome(model, [], 3.0), loop, part, latency_batches=(1, 4))
    assert found["zero"] == {"blocks.1.act": "empty"}
    assert found["rectifiers_left"] == found["after"]["rectifiers"] == 2
    assert found["changed_predictions"] == 0
    assert found["test_accuracy"] == found["unfolded_test_accuracy"]
    assert found["after"]["macs"] < found["before"]["macs"]
    assert set(found["latency_ms"]) == {"1", "4"}
    to_json(found)


def test_a_cut_network_has_no_accuracy() -> None:
    model, loop, part = _setting()
    nn.init.zeros_(model.get_parameter("head.weight"))
    found = measure(Outcome(model, [], 3.0), loop, part)
    assert found["cut"]
    assert "test_accuracy" not in found
