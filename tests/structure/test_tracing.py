"""The graphs of public models: traced as said, every rectifier found, every name kept."""

# ruff: noqa: E402 - what is missing skips before it is imported
from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest

for needed in ("torchvision", "timm", "transformers"):
    pytest.importorskip(needed, reason=f"needs {needed}: `make structure` installs it")

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layer_collapse import track
from layer_collapse.graph import call_counts, ordered_inputs, rectifier_nodes, trace
from layer_collapse.measure.sites import find_sites
from layer_collapse.reduce.proof import difference

from .architectures import ARCHITECTURES, build, call, inputs

_OPERATORS = ("relu", "relu_", "gelu", "silu", "silu_", "hardswish", "hardswish_", "leaky_relu")


class _CountRectifiers(TorchDispatchMode):
    """Counts the kernels of rectifiers, wherever in the model they are called from."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        relu6 = name in ("hardtanh", "hardtanh_") and tuple(args[1:3]) == (0.0, 6.0)
        self.total += name in _OPERATORS or relu6
        return func(*args, **(kwargs or {}))


def executed(model: nn.Module, example: Any) -> int:
    """How many rectifiers one forward pass of a model runs."""
    with _CountRectifiers() as counted:
        call(model, example)
    return counted.total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_models_trace_with_every_rectifier_and_name(name: str) -> None:
    model, example = build(name), inputs(name)
    keys = set(model.state_dict())
    graph = trace(model, example)
    assert graph.meta["traced_by"] == ARCHITECTURES[name].traced_by
    assert len(rectifier_nodes(graph)) == executed(model, example)
    assert difference(call(graph, example), call(model, example)) == (0.0, 0.0)
    assert set(graph.state_dict()) == keys
    assert {id(p) for p in graph.parameters()} == {id(p) for p in model.parameters()}
    sites = find_sites(graph)
    assert len({site.name for site in sites}) == len(sites) == len(rectifier_nodes(graph))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_sizes_have_the_rectifiers_counted_by_hand(name: str) -> None:
    # the graph needs no numbers: on the meta device nothing is computed
    if ARCHITECTURES[name].traced_by == "export":
        pytest.skip("exporting the published size takes long: see the slow test")
    with torch.device("meta"):
        model = ARCHITECTURES[name].full().eval()
        graph = trace(model)
    assert len(rectifier_nodes(graph)) == ARCHITECTURES[name].rectifiers


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.traced_by == "export"])
def test_published_sizes_export(name: str) -> None:
    model, example = build(name, full=True), inputs(name, full=True)
    graph = trace(model, example)
    assert len(rectifier_nodes(graph)) == ARCHITECTURES[name].rectifiers
    assert difference(call(graph, example), call(model, example))[1] <= 1e-6


@pytest.mark.parametrize("name", ["bert", "opt", "swin_t"])
def test_an_exported_graph_takes_other_batches(name: str) -> None:
    model = build(name)
    graph = trace(model, inputs(name))
    other = inputs(name, batch=3)
    assert difference(call(graph, other), call(model, other))[1] <= 1e-6


def has_weights(graph: nn.Module, path: str) -> bool:
    """Whether a submodule has parameters; others that do nothing leave no node in an export."""
    return any(True for _ in graph.get_submodule(path).parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny", "deit_tiny"])
def test_torch_export_gives_the_same_rectifiers_and_layers(name: str) -> None:
    model, example = build(name), inputs(name)
    by_fx, by_export = trace(model, example, by="fx"), trace(model, example, by="export")
    names = [[s.name for s in find_sites(graph)] for graph in (by_fx, by_export)]
    assert names[0] == names[1]
    layers = [
        Counter({p: n for p, n in call_counts(graph).items() if has_weights(graph, p)})
        for graph in (by_fx, by_export)
    ]
    assert layers[0] == layers[1]
    assert difference(call(by_export, example), call(model, example))[1] <= 1e-6


@pytest.mark.parametrize("name", ["swin_t", "efficientnet_lite0", "minilm"])
def test_tracking_counts_every_rectifier_of_models_with_functions(name: str) -> None:
    model, example = build(name), inputs(name)
    expected = call(model, example)
    with track(model, example) as tracker:
        assert difference(call(model, example), expected)[1] <= 1e-6
        assert all(row.positions > 0 for row in tracker.entropy())
    assert len(tracker.sites) == executed(model, example)


def test_ordered_inputs_are_those_of_the_exported_graph() -> None:
    example = inputs("bert")
    assert isinstance(example, dict)
    graph = trace(build("bert"), dict(reversed(example.items())))
    ordered = ordered_inputs(graph, example)
    names = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
    assert all(given is example[str(name)] for given, name in zip(ordered, names, strict=True))


def test_public_models_trace_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("resnet18", "bert"):
            trace(build(name), inputs(name))
