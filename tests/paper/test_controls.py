"""The dense network and the shallow one from scratch."""

from __future__ import annotations

import pytest
import torch
from tiny_suite import SIZES, TINY
from torch import nn

from layer_collapse.graph import rectifier_nodes, trace
from layer_collapse.models import build
from layer_collapse.paper.controls import shallow, train_dense
from layer_collapse.paper.loops import Part, TrainingLoop
from layer_collapse.paper.measure import measure
from layer_collapse.training import Recipe


def _loop(shape: tuple[int, ...] = (1, 8, 8)) -> TrainingLoop:
    x = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    part = Part(x, (x.flatten(1)[:, 0] > 0).long())
    return TrainingLoop(part, part, Recipe(lr=0.01, batch=10))


def test_dense_tells_the_entropy_of_every_epoch() -> None:
    loop, model = _loop(), build("resmlp", (1, 8, 8), 2, width=8, hidden=8, blocks=2)
    outcome = train_dense(model, loop, 2.5)
    assert [entry["epoch"] for entry in outcome.entropy_history] == [1.0, 2.0, 2.5]
    for entry in outcome.entropy_history:
        assert set(entry["rectifiers"]) == {"blocks.0.act", "blocks.1.act"}
        for row in entry["rectifiers"].values():
            assert 0 < row["H"] <= 1
            assert row["sparsity"] == 0
    assert loop.epochs_done == 2.5
    assert not outcome.removed


@pytest.mark.parametrize("name", ["resmlp", "vit", "resnet"])
def test_shallow_has_the_architecture_and_none_of_the_weights(name: str) -> None:
    loop, options = _loop(), {"resnet": {"blocks": 2}}.get(name, {})
    torch.manual_seed(1)
    source = build(name, (1, 8, 8), 2, **options)
    loop.train(source, 1)
    gone = {"resnet": "stages.1.1.act1"}.get(name, "blocks.1.act")
    feeding = gone.replace("act1", "conv1").replace(".act", ".fc1")
    nn.init.zeros_(source.get_parameter(f"{feeding}.weight"))
    folded = measure(train_dense(source, loop, 0.1), loop, loop.validation, None, (1,))
    nn.init.zeros_(source.get_parameter(f"{feeding}.weight"))

    torch.manual_seed(2)
    model = shallow(build(name, (1, 8, 8), 2, **options), {gone: "constant"}, loop, seed=3)
    names = {node.name for node in rectifier_nodes(trace(model, loop.example_inputs))}
    assert gone.replace(".", "_") not in names
    assert len(names) == len(rectifier_nodes(trace(source, loop.example_inputs))) - 1
    assert f"{feeding}.weight" not in dict(model.named_parameters())
    weights = {n: p.clone() for n, p in model.named_parameters() if p.dim() > 1}
    again = shallow(build(name, (1, 8, 8), 2, **options), {gone: "constant"}, loop, seed=4)
    for key, value in again.named_parameters():
        if key in weights and "position" not in key:
            assert not torch.equal(weights[key], value), key
    train_dense(model, loop, 1)
    assert folded["cut"] == ""


def test_a_linearised_rectifier_leaves_its_layers_linear() -> None:
    loop = _loop()
    build_one = TINY.build
    model = shallow(build_one(), {"blocks.1.act": "linearised"}, loop, seed=0)
    left = [node.name for node in rectifier_nodes(trace(model, loop.example_inputs))]
    assert left == ["blocks_0_act", "blocks_2_act"]
    assert SIZES.side == 8
