"""Tracing shares the parameters, leaves the model as it is and refuses what it cannot follow."""

from __future__ import annotations

import io
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from helpers import Switch
from torch import Tensor, nn

import layer_collapse
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
    assert reaches_output(around, without=rectifier_nodes(around)[:1])
    assert not reaches_output(straight, without=rectifier_nodes(straight)[:1])
    assert reaches_output(straight)

    def shape_only(self: Net, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x))).view(x.size(0), x.shape[1], -1)

    shaped = trace(with_forward(shape_only), torch.randn(3, 4))
    assert not reaches_output(shaped, without=rectifier_nodes(shaped)[:1])  # a shape is no data


def test_a_mask_of_padding_is_no_way_around_the_sentence() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc, self.act = nn.Embedding(4, 3), nn.Linear(3, 3), nn.ReLU()

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (self.act(self.fc(self.words(ids))) * mask.unsqueeze(-1)).sum(1)

    graph = trace(Masked())
    assert reaches_output(graph)
    assert not reaches_output(graph, without=rectifier_nodes(graph))


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


def test_what_nothing_can_follow_is_named_and_the_rest_is_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Switch(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"forward of '1' \(Switch\).*\('1\.act'\) are not seen"):
        traced = trace(model, x)
    assert list(traced.meta["hidden"]) == ["1"]
    assert [node.target for node in rectifier_nodes(traced)] == ["3"]
    for sample in (x, -x):
        assert torch.equal(traced(sample), model(sample))
    with pytest.raises(TraceError, match="cannot trace Sequential"):
        trace(model)  # without inputs torch.export cannot be asked


def by_size(self: Net, x: Tensor) -> Tensor:
    hidden = self.a(x)
    if hidden.shape[1] > 4:
        hidden = F.relu(hidden)
    return self.b(hidden)


def test_torch_export_follows_what_torch_fx_does_not() -> None:
    model = with_forward(by_size)
    x = torch.randn(3, 4)
    with pytest.raises(TraceError, match="control flow"):
        trace(model, x, by="fx")
    traced = trace(model, x)
    assert traced.meta["traced_by"] == "export"
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["a", "b"]
    assert len(rectifier_nodes(traced)) == 1
    assert all(getattr(traced, name) is getattr(model, name) for name in ("a", "b"))
    for batch in (x, torch.randn(7, 4)):
        assert torch.equal(traced(batch), model(batch))


def test_modules_are_single_calls_in_exported_graphs_too() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 4), nn.LayerNorm(4), nn.GELU("tanh")),
    )
    x = torch.randn(2, 3, 8, 8)
    graphs = [trace(model, x, by=by) for by in ("fx", "export")]
    targets = [[n.target for n in g.graph.nodes if n.op == "call_module"] for g in graphs]
    assert targets[0] == targets[1]
    graphs[1].train()
    assert graphs[1](x).shape == (2, 4)
    graphs[1].eval()
    assert torch.equal(graphs[1](x), model.eval()(x))


def test_constants_of_exported_graphs_are_no_part_of_the_state_dict() -> None:
    def masked(self: Net, x: Tensor) -> Tensor:
        mask = x.new_zeros(4, 4)
        mask[1:, :2] = 1.0
        return self.a(x @ mask if x.shape[1] == 4 else x)

    model = with_forward(masked)
    x = torch.randn(3, 4)
    traced = trace(model, x)
    assert traced.meta["traced_by"] == "export"
    assert torch.equal(traced(x), model(x))
    assert set(traced.state_dict()) == {"a.weight", "a.bias"}


class ActNorm(nn.BatchNorm2d):
    """A batch norm with its activation inside, by functions."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "images")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        norm = F.batch_norm(
            x, mean, var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps
        )
        return self.act(norm)


@pytest.mark.parametrize("by", ["fx", "export"])
def test_a_functional_layer_becomes_a_module_at_its_path(by: Literal["fx", "export"]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ActNorm(4), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 6, 6)
    traced = trace(model, x, by=by)
    assert type(traced.get_submodule("1")) is nn.BatchNorm2d
    assert set(traced.state_dict()) == set(model.state_dict())
    assert traced.get_submodule("1").weight is model[1].weight
    assert [n.target for n in rectifier_nodes(traced)] == ["1.act"]
    assert all(module.training for module in traced.modules())
    model.eval()
    assert torch.equal(traced.eval()(x), model(x))
    folded = layer_collapse.fold(model, x)
    assert [f.rule for f in folded.report.folds] == ["batch norm"]
    assert folded.report.traced_by == "fx"
    repr(folded.model)


class Depth(nn.Module):
    """Stochastic depth: nothing in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(x.shape[0], 1).bernoulli_(0.5) if self.training else x


def test_what_acts_in_training_only_is_called_as_a_whole() -> None:
    class Block(Net):
        def __init__(self) -> None:
            super().__init__()
            self.depth = Depth()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x + self.depth(self.b(self.act(self.a(x))))

    model = Block()
    x = torch.randn(8, 4)
    traced = trace(model, x)
    assert call_counts(traced)["depth"] == 1
    assert not torch.equal(traced(x), traced(x))
    traced.eval()
    assert torch.equal(traced(x), model.eval()(x))
    assert call_counts(layer_collapse.fold(model, x).model)["depth"] == 0


def test_a_traced_model_is_pickled_and_loaded() -> None:
    model, file, x = Net().eval(), io.BytesIO(), torch.randn(3, 4)
    torch.save(trace(model), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


class Caching(Net):
    """Returns a cache that no graph can return, unless it is told not to; torch.fx gives up."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(use_cache=True)

    def forward(self, x: Tensor, use_cache: bool | None = None) -> Any:  # type: ignore[override]
        if x.sum(1).size(0) != len(x):
            raise ValueError
        y = self.b(self.act(self.a(x)))
        return (y, object()) if (self.config.use_cache if use_cache is None else use_cache) else y


def test_language_models_are_traced_without_their_cache() -> None:
    model, x = Caching().eval(), torch.randn(3, 4)
    traced = trace(model, x)
    assert traced.meta["traced_by"] == "export"
    torch.testing.assert_close(traced(x), model(x, use_cache=False))
    torch.testing.assert_close(layer_collapse.fold(model, x).model(x), traced(x))
    assert model.config.use_cache is True


class Options(Net):
    """Arguments that are no tensors decide what is computed; torch.fx gives up."""

    def forward(  # type: ignore[override]
        self, x: Tensor, double: bool = False, k: float = 1.0, name: str | None = None
    ) -> Tensor:
        y = self.b(self.act(self.a(x)))
        return y * k if double else y


def test_exported_graphs_refuse_other_arguments_than_those_they_were_traced_with(
    tmp_path: Path,
) -> None:
    model, x = Options().eval(), torch.randn(3, 4)
    folded = layer_collapse.fold(model, {"x": x, "double": True, "k": 3.0, "name": None}).model
    layer_collapse.save_folded(folded, tmp_path / "f")
    for graph in (folded, layer_collapse.load_folded(tmp_path / "f")):
        torch.testing.assert_close(graph(x), model(x, True, 3.0))
        torch.testing.assert_close(graph(x[:2], True, 3), model(x[:2], True, 3.0))
        for other in ((False, 3.0), (True, 2.0), (True, 3.0, "given")):
            with pytest.raises(AssertionError, match="for which this graph was traced"):
                graph(x, *other)


def test_forms_in_which_layers_are_not_seen_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval(), torch.randn(2, 4)
    program = torch.export.export(model, (x,)).module()
    for form, told in ((program, "torch.export made it"), (nn.DataParallel(model), "its .module")):
        for call in (trace, layer_collapse.fold):
            with pytest.raises(TraceError, match=told):
                call(form, x)
    inside = layer_collapse.fold(nn.Sequential(nn.DataParallel(model)), x).report.refusals
    assert [(r.name, r.rule) for r in inside] == [("0", "trace")]
    model[0].lock = threading.Lock()
    with pytest.raises(TypeError, match=r"attribute '0\.lock' it does not: cannot pickle"):
        layer_collapse.fold(model, x)
