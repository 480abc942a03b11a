"""Leaving as a constant and as a gate: what changes, and what never does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layer_collapse as lc
from layer_collapse.graph import trace
from layer_collapse.measure.sites import find_sites
from layer_collapse.reduce.gate import AffineGate
from layer_collapse.removal.units import find_units
from layer_collapse.removal.ways import AsConstant, AsGate, Fading, output_means

from .settings import Inverted, encoder


def _trained() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Inverted(), torch.randn(30, 4, 5, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-2)
    for _ in range(5):
        _step(model, optimizer, x)
    return model, x


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=False)
    model(x).square().mean().backward()
    optimizer.step()


def _as_constant(model: nn.Module, x: torch.Tensor) -> AsConstant:
    graph = trace(model, x)
    (unit,) = find_units(graph, find_sites(graph))
    return AsConstant(unit, output_means(model, [unit.exit], [x])[unit.exit])


def _branch(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = model.get_submodule("bn3").register_forward_hook(lambda m, a, y: seen.append(y))
    model(x)
    hook.remove()
    return seen[0].detach()


def test_a_branch_cut_at_once_gives_its_mean_in_both_modes() -> None:
    model, x = _trained()
    model.eval()
    mean = _branch(model, x).mean((0, 2, 3))
    way = _as_constant(model, x)
    before = lc.fingerprint(model)
    with way.momentarily(model), torch.no_grad():
        expected = model(x)
        assert torch.allclose(_branch(model, x), mean.view(1, -1, 1, 1), atol=1e-5)
    assert lc.fingerprint(model) == before
    way.end(model, [x])
    assert way.kind == "constant"
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(_branch(model.train(), x), _branch(model.eval(), x))


def test_neither_momentum_nor_decay_revives_a_cut_branch_and_its_bias_trains_on() -> None:
    model, x = _trained()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-2)
    _step(model, optimizer, x)
    _as_constant(model, x).end(model, [x])
    bias = model.get_parameter("bn3.bias").clone()
    for _ in range(3):
        _step(model, optimizer, x)
    for name in ("expand.weight", "depthwise.weight", "bn3.weight"):
        assert not model.get_parameter(name).any(), name
    assert not torch.equal(model.get_parameter("bn3.bias"), bias)
    branch = _branch(model.eval(), x)
    assert torch.equal(branch, branch[:1, :, :1, :1].expand_as(branch))


def test_on_the_way_the_smallest_weights_go_first_and_stay_gone() -> None:
    model, x = _trained()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    way = _as_constant(model, x)
    weight = model.get_parameter("expand.weight")
    smallest = weight.detach().abs().flatten().argsort()[:16]
    way.begin(model)
    way.move(0.5)
    assert set((weight.flatten() == 0).nonzero().flatten().tolist()) == set(smallest.tolist())
    _step(model, optimizer, x)
    assert int((weight == 0).sum()) < 16  # momentum revived them
    way.move(0.5)
    assert int((weight == 0).sum()) == 16
    way.move(1.0)
    model.train()
    emptied = _branch(model, x)  # what the training sees of an empty branch
    way.end(model, [x])
    assert way.kind == "empty"
    torch.testing.assert_close(_branch(model.eval(), x), emptied)


@pytest.mark.parametrize("inplace", [False, True])
def test_fading_goes_from_the_rectifier_to_the_gate(inplace: bool) -> None:
    gate = AffineGate(torch.tensor([0.5, 1.0]), torch.tensor([0.1, -0.2]))
    fading = Fading(nn.ReLU(inplace), gate)
    z = torch.randn(6, 2)
    for share, weight in ((0.0, 0.0), (0.25, 0.25), (1.0, 1.0)):
        fading.share = share
        expected = (1 - weight) * z.relu() + weight * gate(z)
        torch.testing.assert_close(fading(z.clone()), expected)
    leaf = torch.randn(6, 2, requires_grad=True)
    fading(leaf * 1.0).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, gate.scale.expand(6, 2))


def test_a_gate_stands_in_and_gives_the_place_back() -> None:
    model, x = _trained()
    model.eval()
    act, before = model.get_submodule("act1"), model(x)
    way = AsGate("act1", "act1", AffineGate(torch.ones(8), torch.zeros(8)))
    with way.momentarily(model):
        assert not torch.equal(model(x), before)
    assert model.get_submodule("act1") is act
    assert torch.equal(model(x), before)
    way.begin(model)
    assert torch.equal(model(x), before)
    way.end(model, [x])
    assert [s.name for s in find_sites(trace(model, x))] == ["act2"]


def test_padding_is_left_out_of_a_mean() -> None:
    model, loop = encoder()
    batch = loop.batches()[0]
    assert isinstance(batch, dict)
    fc2 = model.get_submodule("blocks.0.fc2")
    seen: list[torch.Tensor] = []
    hook = fc2.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    mean = output_means(model, ["blocks.0.fc2"], [batch])["blocks.0.fc2"]
    hook.remove()
    rows = seen[0][batch["attention_mask"] > 0].double()
    torch.testing.assert_close(mean, rows.mean(0))
    assert len(rows) < seen[0].shape[0] * seen[0].shape[1]
