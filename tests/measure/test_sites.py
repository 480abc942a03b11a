"""Which layer feeds a rectifier, which dim its neurons lie on, and whether it is a candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layer_collapse as lc
from layer_collapse import models
from layer_collapse.graph import TraceError, trace
from layer_collapse.measure.sites import Site, empty_feeding, find_sites
from layer_collapse.reduce.gate import ConstantBias

B, T = 2, 5  # samples and tokens: no number of channels below equals them


class Layers(nn.Module):
    """Layers to combine in a forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 6), nn.Linear(4, 6)
        self.conv1, self.conv2 = nn.Conv1d(3, 6, 1), nn.Conv2d(3, 6, 3)
        self.bn1, self.bn2 = nn.BatchNorm1d(6), nn.BatchNorm2d(6)
        self.layer_norm, self.group_norm = nn.LayerNorm(6), nn.GroupNorm(2, 6)
        self.pool, self.flatten, self.dropout = nn.MaxPool2d(2), nn.Flatten(), nn.Dropout()
        self.embedding = nn.Embedding(9, 6)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()
        self.scale = nn.Parameter(torch.ones(6))
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


VECTOR, TOKENS = torch.randn(B, 4), torch.randn(B, T, 4)
SIGNAL, IMAGE = torch.randn(B, 3, 7), torch.randn(B, 3, 8, 8)


def sites_of(
    forward: Callable[[Any, Tensor], Tensor], x: Tensor | None, **options: Any
) -> list[Site]:
    return find_sites(trace(Layers(forward), x), **options)


FOLLOWED = {
    # name: (forward, input, dim of the rectifier's input, split, feeding, norm)
    "linear": (lambda m, x: m.act(m.linear(x)), VECTOR, 1, None, "linear", ()),
    "linear over tokens": (lambda m, x: m.act(m.linear(x)), TOKENS, 2, None, "linear", ()),
    "conv1d": (lambda m, x: m.act(m.conv1(x)), SIGNAL, 1, None, "conv1", ()),
    "conv2d": (lambda m, x: m.act(m.conv2(x)), IMAGE, 1, None, "conv2", ()),
    "one image": (lambda m, x: m.act(m.conv2(x)), IMAGE[0], 0, None, "conv2", ()),
    "conv, bn": (lambda m, x: m.act(m.bn2(m.conv2(x))), IMAGE, 1, None, "conv2", ("bn2",)),
    "linear, bn": (lambda m, x: m.act(m.bn1(m.linear(x))), VECTOR, 1, None, "linear", ("bn1",)),
    "layer norm": (
        lambda m, x: m.act(m.layer_norm(m.linear(x))),
        TOKENS,
        2,
        None,
        "linear",
        ("layer_norm",),
    ),
    "group norm": (
        lambda m, x: m.act(m.group_norm(m.conv2(x))),
        IMAGE,
        1,
        None,
        "conv2",
        ("group_norm",),
    ),
    "tokens, transposed, bn": (
        lambda m, x: m.act(m.bn1(m.linear(x).transpose(1, 2))),
        TOKENS,
        1,
        None,
        "linear",
        ("bn1",),
    ),
    "transpose by keyword": (
        lambda m, x: m.act(m.linear(x).transpose(dim0=-1, dim1=1)),
        TOKENS,
        1,
        None,
        "linear",
        (),
    ),
    "torch.transpose": (
        lambda m, x: m.act(torch.transpose(m.linear(x), 0, 2)),
        TOKENS,
        0,
        None,
        "linear",
        (),
    ),
    "permute": (lambda m, x: m.act(m.conv2(x).permute(0, 2, 3, 1)), IMAGE, 3, None, "conv2", ()),
    "permute a tuple": (
        lambda m, x: m.act(m.conv2(x).permute((1, 0, 2, 3))),
        IMAGE,
        0,
        None,
        "conv2",
        (),
    ),
    "permute by keyword": (
        lambda m, x: m.act(torch.permute(m.conv2(x), dims=(0, -2, 3, 1))),
        IMAGE,
        3,
        None,
        "conv2",
        (),
    ),
    "flatten": (lambda m, x: m.act(m.flatten(m.conv2(x))), IMAGE, 1, (1, 6, 36), "conv2", ()),
    "torch.flatten": (
        lambda m, x: m.act(torch.flatten(m.conv2(x), 1)),
        IMAGE,
        1,
        (1, 6, 36),
        "conv2",
        (),
    ),
    "flatten tokens and channels": (
        lambda m, x: m.act(m.linear(x).flatten(1)),
        TOKENS,
        1,
        (T, 6, 1),
        "linear",
        (),
    ),
    "flatten all": (lambda m, x: m.act(m.conv1(x).flatten()), SIGNAL, 0, (B, 6, 7), "conv1", ()),
    "pack tokens": (
        lambda m, x: m.act(m.linear(x).view(-1, 6)),
        TOKENS,
        1,
        None,
        "linear",
        (),
    ),
    "flatten space": (lambda m, x: m.act(m.conv2(x).flatten(2)), IMAGE, 1, None, "conv2", ()),
    "unsqueeze": (lambda m, x: m.act(m.linear(x).unsqueeze(1)), VECTOR, 2, None, "linear", ()),
    "squeeze": (
        lambda m, x: m.act(m.linear(x).unsqueeze(0).squeeze(0)),
        VECTOR,
        1,
        None,
        "linear",
        (),
    ),
    "pool": (lambda m, x: m.act(m.pool(m.conv2(x))), IMAGE, 1, None, "conv2", ()),
    "functional pool": (
        lambda m, x: m.act(F.max_pool2d(m.conv2(x), 2)),
        IMAGE,
        1,
        None,
        "conv2",
        (),
    ),
    "dropout, clone, to": (
        lambda m, x: m.act(F.dropout(m.dropout(m.linear(x)).clone().float(), 0.1)),
        VECTOR,
        1,
        None,
        "linear",
        (),
    ),
    "times a number": (lambda m, x: m.act(2 * m.linear(x) + 1), VECTOR, 1, None, "linear", ()),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_feeding_layer_and_its_channels_are_followed(name: str) -> None:
    forward, x, dim, split, feeding, norm = FOLLOWED[name]
    (site,) = sites_of(forward, x)
    rank = _input_of_act(forward, x).dim()
    assert site.channel_dim % rank == dim
    assert (site.neurons, site.split) == (6, split)
    assert (site.feeding, site.norm) == (feeding, norm)
    assert (site.candidate, site.why_not) == (True, "")
    assert (site.name, site.source, site.functional) == ("act", "act", False)


def _input_of_act(forward: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
    model, seen = Layers(forward), []
    model.act.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    return seen[0]


@pytest.mark.parametrize("shape", ["linear over tokens", "conv2d", "conv, bn", "permute"])
def test_shapes_are_only_asked_for_where_they_are_needed(shape: str) -> None:
    forward, x, *_ = FOLLOWED[shape]
    (site,) = sites_of(forward, None)
    (with_shapes,) = sites_of(forward, x)
    assert site == with_shapes


NO_CANDIDATE = {
    "residual sum": (lambda m, x: m.act(m.linear(x) + m.other(x)), VECTOR, "result of `add`", 6),
    "cat": (lambda m, x: m.act(torch.cat([m.linear(x), m.other(x)], 1)), VECTOR, "of `cat`", 12),
    "cat of samples": (
        lambda m, x: m.act(torch.cat([m.linear(x), m.other(x)])),
        VECTOR,
        "result of `cat`",
        6,
    ),
    "broadcast sum": (
        lambda m, x: m.act(m.linear(x).mul(1.0).unsqueeze(1) + m.scale),
        VECTOR,
        "result of `add`",
        6,
    ),
    "a parameter": (lambda m, x: m.act(m.linear(x) * m.scale), VECTOR, "result of `mul`", 6),
    "its own square": (lambda m, x: m.act(_square(m.linear(x))), VECTOR, "result of `mul`", 6),
    "after a rectifier": (lambda m, x: m.act(m.act2(m.linear(x))), VECTOR, "another rectifier", 6),
    "norm of the input": (
        lambda m, x: m.act(m.layer_norm(torch.cat([x, x[:, :2]], 1))),
        VECTOR,
        "no layer of its own",
        6,
    ),
    "functional layer": (
        lambda m, x: m.act(F.linear(x, m.linear.weight * 2)),
        VECTOR,
        "the function `linear`",
        6,
    ),
    "functional convolution": (
        lambda m, x: m.act(F.conv2d(x, m.conv2.weight * 2)),
        IMAGE,
        "the function `conv2d`",
        6,
    ),
    "called twice": (
        lambda m, x: m.act(m.linear(x)) + m.linear(x * 2),
        VECTOR,
        "'linear' is called 2 times",
        6,
    ),
}


def _square(x: Tensor) -> Tensor:
    return x * x


@pytest.mark.parametrize("name", NO_CANDIDATE)
def test_what_is_no_candidate_says_why(name: str) -> None:
    forward, x, why_not, neurons = NO_CANDIDATE[name]
    site = sites_of(forward, x)[-1]
    assert not site.candidate
    assert why_not in site.why_not
    assert site.neurons == neurons


def test_shared_weights_are_no_candidate() -> None:
    model = Layers(lambda m, x: m.act(m.linear(x)) + m.other(x))
    model.other.weight = model.linear.weight
    (site,) = find_sites(trace(model))
    assert site.why_not == "the weights of its feeding layer 'linear' are shared"
    assert site.feeding == "linear"


def test_an_embedding_is_no_candidate() -> None:
    (site,) = sites_of(lambda m, x: m.act(m.embedding(x)), torch.tensor([[1, 2]]))
    assert (site.neurons, site.channel_dim, site.candidate) == (6, -1, False)
    assert "embedding" in site.why_not


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.act(x),
        lambda m, x: m.act(m.linear(x).sort().values),
        lambda m, x: m.act(torch.stack([m.linear(x), m.other(x)])),
        lambda m, x: m.act(m.linear(x).view(B, 3, 10)),  # cuts across the neurons
        lambda m, x: m.act(torch.einsum("btc->cbt", m.linear(x))),
    ],
)
def test_a_dim_that_cannot_be_told_is_an_error_and_never_a_guess(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    with pytest.raises(TraceError, match=r"which dim of the input of rectifier 'act' holds") as e:
        sites_of(forward, TOKENS)
    assert "ignore=('act',)" in str(e.value)
    assert sites_of(forward, TOKENS, ignore=("act",)) == []


def test_a_reshape_without_shapes_asks_for_them() -> None:
    with pytest.raises(TraceError, match=r"'act'.*pass example_inputs"):
        sites_of(lambda m, x: m.act(m.flatten(m.conv2(x))), None)


def test_names_and_order_of_every_call() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.linear(x))
        x = m.act(x)
        x = F.relu_(x)
        x = m.act(x).relu()
        return F.gelu(x)

    sites = sites_of(forward, VECTOR)
    assert [s.name for s in sites] == [":relu", "act", ":relu#2", "act#2", ":relu#3", ":gelu"]
    assert [s.index for s in sites] == [0, 0, 1, 1, 2, 3]
    assert [s.kind.name for s in sites] == ["relu"] * 5 + ["gelu"]
    left = sites_of(forward, VECTOR, ignore=("act", ":relu#2"))
    assert [(s.name, s.index) for s in left] == [
        (":relu", 0),
        ("act#2", 1),
        (":relu#3", 2),
        (":gelu", 3),
    ]


def test_a_way_around_per_rectifier() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.act2(m.other(x) + m.act(m.linear(x)))

    assert [s.way_around for s in sites_of(forward, VECTOR)] == [True, False]


@pytest.mark.parametrize("name", models.NAMES)
def test_the_models_of_the_package(name: str) -> None:
    model = models.build(name, (1, 8, 8), 10)
    sites = find_sites(trace(model, torch.randn(2, 1, 8, 8)))
    expected = {"resmlp": (6, 6), "mlp": (6, 0), "vit": (6, 6)}
    expected |= {"resnet": (10, 9), "vgg": (7, 0)}
    candidates = [s for s in sites if s.candidate]
    around = [s for s in candidates if s.way_around]
    assert (len(candidates), len(around)) == expected[name]


def test_empty_means_that_every_feeding_weight_is_zero() -> None:
    model = Layers(lambda m, x: m.act(m.linear(x)) + m.act2(m.other(x) + x[:, :1]))
    first, second = find_sites(trace(model))
    assert not empty_feeding(model, [first])[0]
    with torch.no_grad():
        model.linear.weight.zero_()
        model.other.weight.zero_()
    assert empty_feeding(model, [first])[0]  # a bias may stay
    assert not empty_feeding(model, [second])[0]  # a sum has no feeding layer
    with torch.no_grad():
        model.linear.weight[3, 2] = -1e-30
    assert not empty_feeding(model, [first])[0]


def test_a_folded_network_can_be_measured_again() -> None:
    model = models.build("resnet", (1, 8, 8), 10, blocks=1).eval()
    x = torch.randn(8, 1, 8, 8)
    torch.nn.init.zeros_(model.get_parameter("stages.0.0.conv1.weight"))
    torch.nn.init.ones_(model.get_parameter("stages.0.0.bn1.bias"))  # what is left is not zero
    report = lc.scan(model, [x], x)
    folded = lc.fold(lc.linearize(model, report, x).model, x, without=("batch norm",)).model
    assert any(isinstance(m, ConstantBias) for m in folded.modules())
    sites = {site.name: site for site in find_sites(trace(folded, x))}
    assert sites["stages.0.0.act2"].neurons == 16
    assert not sites["stages.0.0.act2"].candidate
