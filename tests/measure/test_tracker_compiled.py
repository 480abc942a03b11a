"""Counting under torch.compile, activation checkpointing and function transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ALL_KINDS, INPLACE_KINDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tracking import (
    FUNCTIONS,
    Layers,
    Masked,
    assert_same_step,
    module,
    reference_counts,
    train_step,
)

from layer_collapse.measure.rectifiers import KINDS
from layer_collapse.measure.tracker import track
from layer_collapse.ops.rectify import POSITIONS


@pytest.fixture
def compiled() -> Any:
    """torch.compile without fallbacks, from an empty cache."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_counts_and_gradients(compiled: Any, inplace: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 3, 2), nn.Linear(12, 6)
            self.kinds = nn.ModuleList(module(k, inplace and k in INPLACE_KINDS) for k in ALL_KINDS)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in ALL_KINDS)
            self.act = nn.ReLU(inplace)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(self.act(self.conv(x).flatten(1)))
            for layer, act in zip(self.layers, self.kinds, strict=True):
                x = act(layer(x))
            x = self.act(F.relu(self.fc.weight.sum() * x, inplace=inplace) - 0.1)
            return F.gelu(x, approximate="tanh") + x.relu()

    model = Net()
    eager = copy.deepcopy(model)
    x = torch.randn(5, 1, 3, 3)
    with track(model, x) as tracker, track(eager, x) as reference:
        got, expected = train_step(compiled(model), x), train_step(eager, x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        for name, ledger in tracker.state_dict().items():
            assert torch.equal(ledger, reference.state_dict()[name]), name
            assert ledger[POSITIONS] > 0


#: What dynamo keeps from a TorchFunctionMode.
HIDDEN_BY_DYNAMO = {
    "F.relu_",
    "torch.relu_",
    "F.leaky_relu_",
    "F.hardswish",
    "F.hardswish in place",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_are_counted_or_named(compiled: Any, name: str) -> None:
    kind, function = FUNCTIONS[name]
    model = Layers(lambda m, x: m.second(function(m.first(x) * 4)))
    plain = copy.deepcopy(model)
    x = torch.randn(16, 4)
    with track(model) as tracker:
        if name in HIDDEN_BY_DYNAMO:
            with pytest.raises(Exception, match=r"rectifier ':\w+': 0 calls were seen"):
                compiled(model)(x)
            return
        got, expected = train_step(compiled(model), x), train_step(plain, x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        (ledger,) = tracker.state_dict().values()
        assert torch.equal(ledger, reference_counts(KINDS[kind], plain.first(x).detach() * 4, 1))


def test_compiled_pauses_without_compiling_again(compiled: Any) -> None:
    model = Masked()
    x = torch.randn(3, 4)
    with track(model) as tracker:
        fast = compiled(model)
        fast(x)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert before == 1
        tracker.pause()
        fast(x)
        tracker.resume()
        fast(x)
        tracker.reset()
        fast(x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        assert all(ledger[POSITIONS] == 3 for ledger in tracker.state_dict().values())
        fast(x, attention_mask=torch.tensor([1, 0, 0]))
        assert all(ledger[POSITIONS] == 4 for ledger in tracker.state_dict().values())
        with tracker.valid(torch.tensor([True, True, False])):
            fast(x)
        assert all(ledger[POSITIONS] == 6 for ledger in tracker.state_dict().values())


def test_tracking_an_already_compiled_model(compiled: Any) -> None:
    model = Masked()
    fast = compiled(model)
    x = torch.randn(3, 4)
    expected = fast(x)
    with track(fast) as tracker:
        torch.testing.assert_close(fast(x), expected)
        assert all(ledger[POSITIONS] == 3 for ledger in tracker.state_dict().values())
    torch.testing.assert_close(fast(x), expected)
    assert all(ledger[POSITIONS] == 3 for ledger in tracker.state_dict().values())


def test_inductor_end_to_end(device: torch.device) -> None:
    torch._dynamo.reset()
    model = Masked().to(device)
    eager = copy.deepcopy(model)
    x = torch.randn(6, 4, device=device)
    with track(model) as tracker, track(eager) as reference:
        got = train_step(torch.compile(model, fullgraph=True), x)
        expected = train_step(eager, x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        for name, ledger in tracker.state_dict().items():
            assert torch.equal(ledger, reference.state_dict()[name])


class Block(nn.Module):
    """A module, a shared module and functions, in the block that is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.act(self.a(x))))
        return F.leaky_relu(F.silu(x - 0.3), 0.2, inplace=True)


class Checkpointed(nn.Module):
    """Blocks that are replayed in the backward pass; the second is called twice."""

    def __init__(self, use_reentrant: bool, on: bool = True) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(4, 6), Block(), Block()
        self.three = self.two
        self.use_reentrant, self.on = use_reentrant, on

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in (self.one, self.two, self.three):
            if self.on and not isinstance(x, torch.fx.Proxy):
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
            else:
                x = block(x)
        return x


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once(use_reentrant: bool) -> None:
    model = Checkpointed(use_reentrant)
    plain = copy.deepcopy(model)
    plain.on = False
    x = torch.randn(7, 4)
    with track(model) as tracker, track(plain) as reference:
        for _ in range(2):
            assert_same_step(train_step(model, x), train_step(plain, x))
        for name, ledger in tracker.state_dict().items():
            assert ledger[POSITIONS] == 14, name
            assert torch.equal(ledger, reference.state_dict()[name]), name


FREE = {
    name: function
    for name, (kind, function) in FUNCTIONS.items()
    if name in ("F.relu", "F.relu6", "F.leaky_relu", "F.prelu", "F.gelu", "F.silu", "F.hardswish")
}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("calls", [1, 2])
def test_checkpointing_inside_the_forward_of_the_owner(
    name: str, calls: int, use_reentrant: bool
) -> None:
    function = FREE[name]

    def inner(m: Layers, x: Tensor) -> Tensor:
        for _ in range(calls):
            x = function(m.second(x))
        return x

    def forward(m: Layers, x: Tensor) -> Tensor:
        x = m.first(x)
        if isinstance(x, torch.fx.Proxy):
            return inner(m, x)
        return checkpoint(inner, m, x, use_reentrant=use_reentrant)

    model = Layers(forward)
    plain = copy.deepcopy(model)
    x = torch.randn(7, 4)
    with track(model) as tracker:
        for _ in range(2):
            assert_same_step(train_step(model, x), train_step(plain, x))
        assert all(ledger[POSITIONS] == 14 for ledger in tracker.state_dict().values())


class Modules(nn.Module):
    """A block of rectifier modules, each called once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.act, self.act2 = nn.ReLU(inplace=True), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.b(self.act(self.a(x))))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_checkpointing_counts_once(
    compiled: Any, whole: bool, use_reentrant: bool
) -> None:
    """The whole model compiled, or each replayed block."""
    model = Checkpointed(use_reentrant)
    if whole:  # dynamo refuses to enter a mode, or to number calls, inside of a checkpoint
        model.one, model.two, model.three = Modules(), Modules(), Modules()
    else:  # a block that is called twice and compiled apart cannot tell a replay from a third call
        model.three = Block()
    plain = copy.deepcopy(model)
    plain.on = False
    x = torch.randn(7, 4)
    with track(model) as tracker, track(plain) as reference:
        fast: Any = compiled(model) if whole else model
        for block in (model.one, model.two, model.three) if not whole else ():
            block.compile(fullgraph=True, backend="aot_eager")
        for _ in range(2):
            for a, b in zip(train_step(fast, x), train_step(plain, x), strict=True):
                torch.testing.assert_close(a, b)
        for name, ledger in tracker.state_dict().items():
            assert ledger[POSITIONS] == 14, name
            assert torch.equal(ledger, reference.state_dict()[name]), name


# Function transforms


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 1))


def test_function_transforms_count_once_per_forward() -> None:
    x = torch.randn(7, 4)
    model, plain = small(), small()
    names = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], module: nn.Module = model) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    def of_plain(parameters: dict[str, Tensor]) -> Tensor:
        return loss(parameters, plain)

    def curvature(parameters: dict[str, Tensor], f: Any) -> Tensor:
        return torch.func.grad(f)(parameters)["0.weight"].sum()

    def transforms(module: nn.Module, f: Any) -> list[Callable[[], Any]]:
        return [
            lambda: torch.func.functional_call(module, names, (x,)),
            lambda: torch.func.grad(f)(names),
            lambda: torch.func.jvp(f, (names,), (names,)),
            lambda: torch.func.grad(curvature)(names, f),
        ]

    with track(model) as tracker:
        for ours, theirs in zip(transforms(model, loss), transforms(plain, of_plain), strict=True):
            torch.testing.assert_close(ours(), theirs(), rtol=0, atol=0)
            assert {row.positions for row in tracker.entropy()} == {7}
            tracker.reset()


def test_vmap_is_refused_in_one_sentence() -> None:
    model = small()
    with track(model), pytest.raises(RuntimeError, match=r"cannot run under torch\.func\.vmap"):
        torch.func.vmap(model)(torch.randn(7, 4))
    assert torch.func.vmap(model)(torch.randn(7, 4)).shape == (7, 1)
