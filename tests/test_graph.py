"""Tracing shares the parameters, leaves the model as it is and refuses what it cannot follow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse.graph import (
    TraceError,
    call_counts,
    depth,
    reaches_output,
    rectifier_nodes,
    shape_of,
    trace,
    training_mode,
)


class Net(nn.Module):
    """Linear, rectifier, dropout, linear around which the input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        hidden = F.dropout(self.act(self.a(x)), 0.5, self.training)
        if mask is not None:
            hidden = hidden * mask
        return x + self.b(hidden) * scale


def with_forward(forward: Callable[..., Tensor]) -> nn.Module:
    """Net's layers under another forward."""
    model: nn.Module = type("Odd", (Net,), {"forward": forward})()
    return model


def test_the_graph_computes_what_the_model_computes_with_its_parameters() -> None:
    model = Net().eval()
    traced = trace(model)
    x = torch.randn(3, 4)
    assert torch.equal(traced(x), model(x))
    ours = dict(model.named_parameters())
    theirs = dict(traced.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(theirs[key] is parameter for key, parameter in ours.items())


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_switches_and_the_model_keeps_its_modes(training: bool) -> None:
    model = Net().train(training)
    model.act.train(not training)
    before = {name: module.training for name, module in model.named_modules()}
    traced = trace(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    x = torch.ones(64, 4)
    for mode in (True, False):
        traced.train(mode)
        assert torch.equal(traced(x), traced(x)) is not mode


def test_optional_arguments_take_the_path_that_is_given() -> None:
    model = Net().eval()
    x, mask = torch.randn(3, 4), torch.tensor([0.0, 1.0] * 4)
    assert [n.target for n in trace(model).graph.nodes if n.op == "placeholder"] == ["x"]
    for example in ((x, mask), {"x": x, "mask": mask}):
        traced = trace(model, example)
        assert torch.equal(traced(x, mask), model(x, mask))
        assert not torch.equal(traced(x, mask), model(x))


def test_tensors_that_forward_creates_are_left_in_the_graph_alone() -> None:
    model = with_forward(lambda self, x: F.prelu(self.a(x), torch.tensor([0.25])))
    before = set(vars(model))
    traced = trace(model)
    assert set(vars(model)) == before
    x = torch.randn(3, 4)
    assert torch.equal(traced(x), model(x))


def test_example_inputs_give_shapes() -> None:
    model = Net()
    nodes = {n.name: n for n in trace(model, torch.randn(3, 4)).graph.nodes}
    assert shape_of(nodes["a"]) == (3, 8)
    assert shape_of(nodes["add"]) == (3, 4)
    assert all(shape_of(n) is None for n in trace(model).graph.nodes)


def test_shapes_are_recorded_without_touching_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, torch.randn(3, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_follows_an_in_place_rectifier_reads_its_result() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        hidden = self.a(x)
        F.relu(hidden, inplace=True)
        return self.b(hidden)

    model = with_forward(forward)
    traced = trace(model)
    (relu,) = rectifier_nodes(traced)
    assert [user.name for user in relu.users] == ["b"]
    x = torch.randn(3, 4)
    assert torch.equal(traced(x), model(x))


def test_every_way_to_call_a_rectifier_is_found() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        x = F.relu(x)
        x = torch.relu(x)
        x = torch.relu_(x)
        x = x.relu()
        x = x.relu_()
        x = F.relu_(x)
        x = F.relu6(x)
        x = F.leaky_relu(x, 0.2)
        x = F.leaky_relu_(x, 0.2)
        x = F.prelu(x, x.new_ones(1))
        x = x.prelu(x.new_ones(1))
        x = F.gelu(x, approximate="tanh")
        x = F.silu(x, True)
        return F.hardswish(input=x)

    assert len(rectifier_nodes(trace(with_forward(forward)))) == 15


def test_a_way_around() -> None:
    around, straight = trace(Net()), trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert reaches_output(around, without=rectifier_nodes(around)[0])
    assert not reaches_output(straight, without=rectifier_nodes(straight)[0])
    assert reaches_output(straight)

    def shape_only(self: Net, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x))).view(x.size(0), x.shape[1], -1)

    shaped = trace(with_forward(shape_only), torch.randn(3, 4))
    assert not reaches_output(shaped, without=rectifier_nodes(shaped)[0])  # a shape is no data


def test_depth_is_the_longest_path_of_weighted_layers() -> None:
    assert depth(trace(Net())) == 2
    assert depth(trace(nn.Sequential(nn.ReLU()))) == 0

    def two_branches(self: Net, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.b(self.a(self.b(self.a(x))))

    traced = trace(with_forward(two_branches))
    assert depth(traced) == 4
    assert call_counts(traced) == {"a": 3, "b": 3}


def test_training_mode_is_given_back_after_an_error() -> None:
    model = Net().train()
    model.b.eval()
    with pytest.raises(ZeroDivisionError), training_mode(model, False):
        _ = 1 / int(model.act.training)
    assert model.act.training
    assert not model.b.training


def data_dependent(self: Net, x: Tensor) -> Tensor:
    x = self.a(x)
    return F.relu(x) if x.sum() > 0 else x


def training_only(self: Net, x: Tensor) -> Tensor:
    x = self.a(x)
    return F.relu(x) if self.training else x


def another_layer_in_training(self: Net, x: Tensor) -> Tensor:
    return self.b(self.a(x)) if self.training else self.a(x)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (data_dependent, "cannot trace Odd: its forward has control flow"),
        (training_only, "Odd.forward computes something else in training than in evaluation"),
        (another_layer_in_training, "Odd.forward computes something else in training"),
    ],
)
def test_what_one_graph_cannot_stand_for_is_refused(
    forward: Callable[..., Tensor], message: str
) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        trace(with_forward(forward))
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit_are_named() -> None:
    with pytest.raises(TraceError, match="does not run on the example inputs"):
        trace(Net(), torch.randn(3, 5))


@pytest.mark.parametrize(
    "hiding",
    [
        nn.TransformerEncoderLayer(4, 2, 8),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False),
        nn.TransformerDecoderLayer(4, 2, 8),
        nn.RNN(4, 4, nonlinearity="relu"),
        nn.RNNCell(4, 4, nonlinearity="relu"),
        type("Encoder", (nn.TransformerEncoderLayer,), {})(4, 2, 8),
    ],
    ids=lambda module: type(module).__name__,
)
def test_hidden_rectifiers_are_named(hiding: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(hiding))
    with pytest.raises(TraceError, match=r"rectifier inside '1\.0[^']*' \(\w+\) cannot be instr"):
        trace(model)
    trace(nn.Sequential(nn.Linear(4, 4), nn.RNN(4, 4)))  # tanh hides nothing
