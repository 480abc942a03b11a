"""Tracking counts every rectifier once, changes nothing else and can be undone."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ALL_KINDS, INPLACE_KINDS, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layer_collapse import models
from layer_collapse.graph import TraceError
from layer_collapse.measure.rectifiers import KINDS, Call, Kind
from layer_collapse.measure.report import EntropyReport
from layer_collapse.measure.tracker import EntropyTracker, track
from layer_collapse.ops.rectify import POSITIONS, counts_of, new_ledger, rectify_reference

Forward = Callable[..., Tensor]


class Layers(nn.Module):
    """Layers to combine in a forward: 4 -> 6 features, 6 -> 6."""

    def __init__(self, forward: Forward, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.act = act if act is not None else nn.ReLU()
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def module(kind: Kind, inplace: bool = False) -> nn.Module:
    """The module of a kind, with arguments that are not the defaults."""
    arguments: dict[str, Any] = {"inplace": True} if inplace else {}
    if kind.name == "leaky_relu":
        arguments["negative_slope"] = 0.3
    if kind.name == "gelu_tanh":
        arguments["approximate"] = "tanh"
    if kind.name == "prelu":
        arguments = {"num_parameters": 6, "init": 0.1}
    return kind.module(**arguments)


def reference_counts(kind: Kind, x: Tensor, dim: int, valid: Tensor | None = None) -> Tensor:
    """The ledger that seeing x once gives."""
    ledger = new_ledger(kind, x.shape[dim])
    weight = torch.ones(1, dtype=x.dtype) if kind.name == "prelu" else None
    rectify_reference(Call(kind, x.clone(), weight=weight), ledger, dim, valid)
    return ledger


def train_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of every parameter."""
    x = x.clone().requires_grad_(x.is_floating_point())
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), *(g.clone() for g in grads), *([x.grad] if x.grad is not None else [])]


def assert_same_step(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


# ---- every way to call a rectifier


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "inplace"),
    [(k, False) for k in ALL_KINDS] + [(k, True) for k in INPLACE_KINDS],
    ids=lambda value: getattr(value, "name", "in place" if value is True else ""),
)
def test_modules(kind: Kind, inplace: bool, training: bool) -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), module(kind, inplace), nn.Linear(6, 2)
    )
    model.train(training)
    plain = copy.deepcopy(model)
    x = torch.randn(16, 4)
    tracker = track(model)
    assert_same_step(train_step(model, x), train_step(plain, x))
    with torch.no_grad():
        # the same statistics of the batch: training uses the batch's own
        hidden = plain[1](plain[0](x))
    expected = reference_counts(kind, hidden, 1)
    assert torch.equal(tracker.state_dict()["2"], expected)
    for key, value in model.state_dict().items():
        if "running" not in key and "tracked" not in key:
            assert torch.equal(value, plain.state_dict()[key])


FUNCTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("relu", lambda x: F.relu(x)),
    "F.relu in place": ("relu", lambda x: F.relu(x, inplace=True)),
    "F.relu in place, positional": ("relu", lambda x: F.relu(x, True)),
    "F.relu_": ("relu", lambda x: F.relu_(x)),
    "F.relu by keyword": ("relu", lambda x: F.relu(input=x)),
    "torch.relu": ("relu", lambda x: torch.relu(x)),
    "torch.relu_": ("relu", lambda x: torch.relu_(x)),
    "x.relu()": ("relu", lambda x: x.relu()),
    "x.relu_()": ("relu", lambda x: x.relu_()),
    "F.relu6": ("relu6", lambda x: F.relu6(x)),
    "F.relu6 in place": ("relu6", lambda x: F.relu6(x, inplace=True)),
    "F.leaky_relu": ("leaky_relu", lambda x: F.leaky_relu(x)),
    "F.leaky_relu, slope": ("leaky_relu", lambda x: F.leaky_relu(x, 0.3)),
    "F.leaky_relu in place": ("leaky_relu", lambda x: F.leaky_relu(x, 0.3, True)),
    "F.leaky_relu_": ("leaky_relu", lambda x: F.leaky_relu_(x, negative_slope=0.3)),
    "F.prelu": ("prelu", lambda x: F.prelu(x, torch.tensor([0.3]))),
    "torch.prelu": ("prelu", lambda x: torch.prelu(x, weight=torch.linspace(-1, 1, 6))),
    "x.prelu()": ("prelu", lambda x: x.prelu(torch.tensor([0.3]))),
    "F.gelu": ("gelu", lambda x: F.gelu(x)),
    "F.gelu tanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "F.silu": ("silu", lambda x: F.silu(x)),
    "F.silu in place": ("silu", lambda x: F.silu(x, inplace=True)),
    "F.hardswish": ("hardswish", lambda x: F.hardswish(x)),
    "F.hardswish in place": ("hardswish", lambda x: F.hardswish(x, True)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    kind, function = FUNCTIONS[name]

    def forward(m: Layers, x: Tensor) -> Tensor:
        return m.second(function(m.first(x) * 4))

    model = Layers(forward)
    plain = copy.deepcopy(model)
    x = torch.randn(16, 4)
    tracker = track(model)
    assert_same_step(train_step(model, x), train_step(plain, x))
    (ledger,) = tracker.state_dict().values()
    assert torch.equal(ledger, reference_counts(KINDS[kind], plain.first(x).detach() * 4, 1))
    assert tracker.sites[0].kind.name == kind


def test_several_calls_of_a_shared_module_have_their_own_counts() -> None:
    def forward(m: Layers, x: Tensor) -> Tensor:
        return m.act(m.second(m.act(m.first(x))))

    model = Layers(forward)
    x = torch.randn(16, 4)
    with torch.no_grad():
        first = model.first(x)
        second = model.second(first.relu())
    with track(model) as tracker:
        for _ in range(3):
            model(x)
        state = tracker.state_dict()
    assert state.keys() == {"act", "act#2"}
    for name, hidden in (("act", first), ("act#2", second)):
        expected = reference_counts(KINDS["relu"], hidden, 1)
        assert torch.equal(state[name][POSITIONS:], expected[POSITIONS:] * 3)


def test_several_functions_and_nested_owners() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(F.relu(self.fc(x)) - 0.2)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.act = nn.Linear(4, 6), Inner(), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            x = self.act(self.inner(x))
            x = self.inner(x)
            return F.silu(x) + torch.relu(x)

    model = Outer()
    plain = copy.deepcopy(model)
    x = torch.randn(16, 4)
    with track(model) as tracker:
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), plain(x))
        state = tracker.state_dict()
    assert list(state) == [
        ":relu",
        "inner:relu",
        "inner:gelu",
        "act",
        "inner:relu#2",
        "inner:gelu#2",
        ":silu",
        ":relu#2",
    ]
    assert all(ledger[POSITIONS] == 32 for ledger in state.values())
    hidden = plain.inner.fc(plain.first(x).relu()).detach()
    expected = reference_counts(KINDS["relu"], hidden, 1)
    assert torch.equal(
        counts_of(state["inner:relu"], KINDS["relu"]), counts_of(expected, KINDS["relu"]) * 2
    )


@pytest.mark.parametrize("ignored", ["act", ":relu", "inner.act"])
def test_what_is_ignored_is_counted_nowhere(ignored: str) -> None:
    class Outer(Layers):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.inner(F.relu(m.act(m.first(x)))))
            self.inner = nn.Sequential()
            self.inner.act = nn.ReLU()

    model = Outer()
    plain = copy.deepcopy(model)
    x = torch.randn(8, 4)
    with track(model, ignore=[ignored]) as tracker:
        for _ in range(2):
            assert torch.equal(model(x), plain(x))
        state = tracker.state_dict()
    assert state.keys() == {"act", ":relu", "inner.act"} - {ignored}
    assert all(ledger[POSITIONS] == 16 for ledger in state.values())


def test_prelu_slopes_over_tokens_are_not_the_neurons() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6))
    nn.init.uniform_(model[1].weight, -1, 1)
    plain = copy.deepcopy(model)
    x = torch.randn(3, 6, 4)  # six tokens, six slopes, six neurons
    with track(model) as tracker:
        assert_same_step(train_step(model, x), train_step(plain, x))
    expected = reference_counts(KINDS["prelu"], plain[0](x).detach(), -1)
    assert torch.equal(tracker.state_dict()["1"], expected)


def test_prelu_over_flattened_channels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.PReLU(12))
    nn.init.uniform_(model[2].weight, -1, 1)
    plain = copy.deepcopy(model)
    x = torch.randn(5, 1, 3, 3)
    with track(model, x) as tracker:
        assert_same_step(train_step(model, x), train_step(plain, x))
    expected = reference_counts(KINDS["prelu"], plain[0](x).detach(), 1)
    assert torch.equal(tracker.state_dict()["2"], expected)


# ---- shapes


@pytest.mark.parametrize("inplace", [False, True])
def test_flattened_channels_are_counted_per_channel_at_any_batch(inplace: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.ReLU(inplace), nn.Linear(12, 2))
    plain = copy.deepcopy(model)
    with track(model, torch.randn(2, 1, 3, 3)) as tracker:
        for batch in (5, 1, 0):
            x = torch.randn(batch, 1, 3, 3)
            tracker.reset()
            assert_same_step(train_step(model, x), train_step(plain, x))
            expected = reference_counts(KINDS["relu"], plain[0](x).detach(), 1)
            assert torch.equal(tracker.state_dict()["2"], expected)


def test_channels_packed_with_the_batch_are_counted_at_any_batch() -> None:
    model = Layers(lambda m, x: F.relu(m.first(x).flatten()))
    with track(model, torch.randn(2, 4)) as tracker:
        for batch in (7, 3):
            x = torch.randn(batch, 4)
            tracker.reset()
            assert torch.equal(model(x), model.first(x).flatten().relu())
            expected = reference_counts(KINDS["relu"], model.first(x).detach(), 1)
            assert torch.equal(tracker.state_dict()[":relu"], expected)


def test_one_neuron_squeezed_away() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), nn.ReLU())
    with track(model, torch.randn(2, 4)) as tracker:
        x = torch.randn(9, 4)
        model(x)
        expected = reference_counts(KINDS["relu"], model[0](x).detach(), 1)
    assert torch.equal(tracker.state_dict()["2"], expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_models_of_the_package_bit_for_bit(name: str, layout: torch.memory_format) -> None:
    model = models.build(name, (1, 8, 8), 10).to(memory_format=layout)
    plain = copy.deepcopy(model)
    x = torch.randn(3, 1, 8, 8).to(memory_format=layout)
    seen: dict[str, Tensor] = {}
    for path, act in plain.named_modules():
        if isinstance(act, nn.ReLU):
            act.register_forward_pre_hook(
                lambda _, a, path=path: seen.update({path: a[0].detach()})
            )
    tracker = track(model)
    assert_same_step(train_step(model, x), train_step(plain, x))
    for site in tracker.sites:
        expected = reference_counts(site.kind, seen[site.name], site.channel_dim)
        assert torch.equal(tracker.state_dict()[site.name], expected), site.name


def test_conv1d_is_not_mistaken_for_tokens() -> None:
    conv, linear = nn.Conv1d(5, 5, 1), nn.Linear(5, 5)  # [N, 5, 5] either way
    x = torch.randn(2, 5, 5)
    for layer, dim in ((conv, 1), (linear, 2)):
        model = nn.Sequential(layer, nn.ReLU())
        with track(model) as tracker:
            model(x)
        expected = reference_counts(KINDS["relu"], layer(x).detach(), dim)
        assert torch.equal(tracker.state_dict()["1"], expected)


def test_an_empty_batch_counts_nothing() -> None:
    model = models.build("mlp", (1, 4, 4), 3, width=6, layers=2)
    with track(model) as tracker:
        assert model(torch.randn(0, 1, 4, 4)).shape == (0, 3)
        assert [row.state for row in tracker.entropy()] == ["unmeasured"] * 2


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_autocast(kind: Kind, device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 6), module(kind), nn.Linear(6, 2)).to(device)
    plain = copy.deepcopy(model)
    x = torch.randn(16, 4, device=device)
    with track(model) as tracker, torch.autocast(device.type, torch.bfloat16):
        got = train_step(model, x)
        expected = train_step(plain, x)
        hidden = plain[0](x).detach()
    assert hidden.dtype == torch.bfloat16
    assert_same_step(got, expected)
    assert torch.equal(tracker.state_dict()["1"], reference_counts(kind, hidden, 1))


# ---- it changes nothing, and can be undone


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """What of every module may not change: class and every attribute, hooks included."""
    return [
        (
            name,
            type(m),
            {k: dict(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()},
        )
        for name, m in model.named_modules()
    ]


class Masked(Layers):
    def __init__(self) -> None:
        super().__init__(lambda m, x: x)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.act(self.first(x))
        return F.relu(self.act(self.second(hidden)))


def test_remove_restores_everything() -> None:
    model = Masked()
    model.act.register_forward_hook(lambda *_: None)
    before, keys = snapshot(model), list(model.state_dict())
    tracker = track(model)
    assert snapshot(model) != before
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == [entry[0] for entry in before]
    assert isinstance(model.act, nn.ReLU)
    assert repr(model) == repr(Masked().train())
    model(torch.randn(3, 2, 4))
    tracker.remove()
    assert snapshot(model) == before
    tracker.remove()  # twice is once
    assert snapshot(model) == before
    counted = tracker.state_dict()
    model(torch.randn(3, 2, 4))
    assert all(torch.equal(ledger, counted[k]) for k, ledger in tracker.state_dict().items())
    assert counted["act"][POSITIONS] == 6
    with track(model):  # and it can be tracked again
        model(torch.randn(3, 2, 4))
    assert snapshot(model) == before


def test_the_signature_of_forward_stays() -> None:
    model = Masked()
    before = inspect.signature(model.forward)
    with track(model):
        assert inspect.signature(model.forward) == before


def test_an_exception_removes_the_tracker_of_a_with() -> None:
    model = Masked()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), track(model):
        model(torch.randn(3, 5))
    assert snapshot(model) == before


def test_a_failed_start_changes_nothing() -> None:
    model = Layers(lambda m, x: m.act(x))
    before = snapshot(model)
    with pytest.raises(TraceError, match="'act'"):
        track(model)
    assert snapshot(model) == before


def test_exceptions_inside_forward_leave_the_tracker_usable() -> None:
    fail = [True]

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if fail[0]:
                raise ArithmeticError
            return x

    class Net(Layers):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.act(m.second(m.failing(F.relu(m.act(m.first(x)))))))
            self.failing = Failing()

    model = Net()
    fail[0] = False
    tracker = track(model)
    fail[0] = True
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            model(torch.randn(3, 4))
    fail[0] = False
    tracker.reset()
    model(torch.randn(3, 4))
    assert all(ledger[POSITIONS] == 3 for ledger in tracker.state_dict().values())
    assert torch.nn.functional.relu(torch.tensor([-1.0])) == 0  # nothing is caught any longer
    assert all(ledger[POSITIONS] == 3 for ledger in tracker.state_dict().values())


def test_a_copy_runs_and_counts_apart() -> None:
    model = Masked()
    with track(model) as tracker:
        twin = copy.deepcopy(model)
        x = torch.randn(3, 4)
        assert torch.equal(twin(x), model(x))
        assert torch.equal(twin(x, torch.ones(3)), model(x))
        assert all(ledger[POSITIONS] == 6 for ledger in tracker.state_dict().values())
        assert list(twin.state_dict()) == list(model.state_dict())


def test_nothing_is_counted_while_paused() -> None:
    model = Masked()
    with track(model) as tracker:
        model(torch.randn(3, 4))
        before = tracker.state_dict()
        tracker.pause()
        model(torch.randn(5, 4))
        tracker.reset()
        model(torch.randn(5, 4))
        assert all(not ledger.any() for ledger in tracker.state_dict().values())
        tracker.resume()
        model(torch.randn(3, 4))
        after = tracker.state_dict()
    assert all(after[k][POSITIONS] == before[k][POSITIONS] == 3 for k in before)


def test_counts_can_be_saved_and_loaded() -> None:
    model, other = Masked(), Masked()
    x = torch.randn(5, 4)
    with track(model) as tracker, track(other) as restored:
        model(x)
        state = tracker.state_dict()
        model(x)
        restored.load_state_dict(state)
        other.load_state_dict(model.state_dict())
        other(x)
        for name, ledger in restored.state_dict().items():
            assert torch.equal(ledger, tracker.state_dict()[name])
        with pytest.raises(ValueError, match=r"rectifiers differ \(nobody\)"):
            restored.load_state_dict({**state, "nobody": state["act"]})
        with pytest.raises(ValueError, match=r"counts of 'act': expected int64 of 24 words"):
            restored.load_state_dict({**state, "act": torch.zeros(3, dtype=torch.int64)})
        with pytest.raises(ValueError, match=r"counts of 'act': expected int64"):
            restored.load_state_dict({**state, "act": torch.zeros(20)})


# ---- masks of valid positions


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("keyword", [True, False])
def test_the_attention_mask_is_honoured(keyword: bool, dtype: torch.dtype) -> None:
    model = Masked()
    x, mask = torch.randn(3, 5, 4), torch.rand(3, 5) < 0.5
    given = mask.to(dtype)
    with track(model) as tracker:
        _ = model(x, attention_mask=given) if keyword else model(x, given)
        expected = reference_counts(KINDS["relu"], model.first(x).detach(), -1, mask)
        assert torch.equal(tracker.state_dict()["act"], expected)
        tracker.reset()
        model(x)  # the mask of one call is not that of the next
        assert tracker.state_dict()["act"][POSITIONS] == 15


def test_a_mask_by_hand_goes_before_the_models_own() -> None:
    model = Masked()
    x, mask = torch.randn(3, 5, 4), torch.rand(3, 5) < 0.5
    with track(model) as tracker:
        with tracker.valid(mask):
            model(x, attention_mask=torch.ones(3, 5))
            model(x)
        expected = reference_counts(KINDS["relu"], model.first(x).detach(), -1, mask)
        got = tracker.state_dict()["act"]
        assert torch.equal(got[POSITIONS:], 2 * expected[POSITIONS:])
        with pytest.raises(ZeroDivisionError), tracker.valid(mask):
            _ = 1 / 0
        tracker.reset()
        model(x)
        assert tracker.state_dict()["act"][POSITIONS] == 15


def test_masks_are_broadcast_packed_and_pooled() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])  # [B, T]
    per_sample = torch.tensor([True, False])

    def counted(model: nn.Module, x: Tensor, valid: Tensor, example: Tensor | None = None) -> int:
        with track(model, example) as tracker:
            with tracker.valid(valid):
                model(x)
            (ledger,) = tracker.state_dict().values()
        return int(ledger[POSITIONS])

    tokens = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    assert counted(tokens, torch.randn(2, 3, 4), mask) == 2
    assert counted(tokens, torch.randn(2, 3, 7, 4), mask) == 14  # over further positions
    assert counted(tokens, torch.randn(2, 3, 4), per_sample) == 3
    assert counted(tokens, torch.randn(6, 4), mask) == 2  # packed
    assert counted(tokens, torch.randn(2, 4), mask) == 1  # pooled: any token counts the sample
    image = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU())
    assert counted(image, torch.randn(2, 1, 3, 5), per_sample) == 15
    assert counted(image, torch.randn(2, 1, 3, 5), mask) == 10  # rows of the image
    flat = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Flatten(), nn.ReLU())
    x = torch.randn(2, 1, 3, 5)
    assert counted(flat, x, per_sample, x) == 15


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 2), (2, 3, 1, 1, 1)])
def test_a_mask_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    model = Masked()
    with track(model) as tracker, tracker.valid(torch.ones(shape)):
        with pytest.raises(RuntimeError, match=r"rectifier 'act': the mask of valid positions"):
            model(torch.randn(2, 3, 4))
        assert not any(ledger[POSITIONS:].any() for ledger in tracker.state_dict().values())


# ---- torch.compile


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


# ---- activation checkpointing


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


# ---- what cannot be tracked is named


def test_a_rectifier_that_the_trace_does_not_see_is_an_error_when_called() -> None:
    use = [False]

    def forward(m: Layers, x: Tensor) -> Tensor:
        x = F.gelu(m.first(x))
        return m.act(x) if use[0] else x

    model = Layers(forward)
    with track(model) as tracker:
        model(torch.randn(3, 4))
        use[0] = True
        with pytest.raises(RuntimeError, match=r"rectifier 'act' is called more often .*\(0 calls"):
            model(torch.randn(3, 4))
        use[0] = False
        model(torch.randn(3, 4))
        assert list(tracker.state_dict()) == [":gelu"]
    with track(model, ignore=["act"]):  # as the message advises
        use[0] = True
        model(torch.randn(3, 4))


def test_functions_that_come_or_go_are_an_error() -> None:
    times = [2]

    def forward(m: Layers, x: Tensor) -> Tensor:
        x = m.act(m.first(x))
        for _ in range(times[0]):
            x = F.relu(x)
        return x

    with track(model := Layers(forward)):
        for times[0] in (1, 0):
            with pytest.raises(
                RuntimeError, match=r"rectifier ':relu, :relu#2': \d calls were seen"
            ):
                model(torch.randn(3, 4))
        times[0] = 3
        with pytest.raises(RuntimeError, match=r"rectifier ':relu, :relu#2' is called more often"):
            model(torch.randn(3, 4))
    times[0] = 1
    with track(model):
        times[0] = 2
        with pytest.raises(RuntimeError, match=r"rectifier ':relu': 2 calls were seen"):
            model(torch.randn(3, 4))


@pytest.mark.parametrize("path", ["", "inner", "inner.act"])
def test_a_forward_on_the_instance_is_an_error(path: str) -> None:
    class Outer(Layers):
        def __init__(self) -> None:
            super().__init__(lambda m, x: F.relu(m.inner(m.first(x))))
            self.inner = Layers(lambda m, x: m.act(F.gelu(x)))

    model = Outer()
    owner = model.get_submodule(path)
    owner.forward = type(owner).forward.__get__(owner)  # goes past what is put into its class
    before = snapshot(model)
    with pytest.raises(TraceError, match=r"cannot be counted: the forward of '.*' was replaced"):
        track(model)
    assert snapshot(model) == before


def test_more_calls_than_traced_are_an_error() -> None:
    times = [2]

    def forward(m: Layers, x: Tensor) -> Tensor:
        x = m.first(x)
        for _ in range(times[0]):
            x = m.act(x)
        return x

    with track(model := Layers(forward)):
        model(torch.randn(3, 4))
        times[0] = 3
        with pytest.raises(RuntimeError, match=r"rectifier 'act' is called more often .*2 calls"):
            model(torch.randn(3, 4))


def test_other_calls_than_traced_are_an_error() -> None:
    swap = [False]

    def forward(m: Layers, x: Tensor) -> Tensor:
        one, two = (F.relu, F.gelu) if swap[0] else (F.gelu, F.relu)
        return two(m.second(one(m.first(x))))

    with track(model := Layers(forward)):
        swap[0] = True
        with pytest.raises(RuntimeError, match=r"':gelu' was traced as gelu and is called as relu"):
            model(torch.randn(3, 4))


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 1, 9, 9)])
def test_other_shapes_later_are_an_error_that_names_the_rectifier(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.ReLU())
    with (
        track(model, torch.randn(2, 1, 8, 8)),
        pytest.raises(RuntimeError, match=r"rectifier '2': expected 3 neurons in dim 1 of its"),
    ):
        model(torch.randn(shape))

    square = Layers(lambda m, x: m.act(m.second(x).permute(0, 2, 1)))
    with (
        track(square, torch.randn(2, 5, 6)),
        pytest.raises(RuntimeError, match=r"rectifier 'act': expected 6 neurons in dim 1"),
    ):
        square.act(torch.randn(3, 5, 6))

    with (
        track(square, torch.randn(2, 5, 6)),
        pytest.raises(RuntimeError, match=r"rectifier 'act': expected 6 neurons in dim 1"),
    ):
        square.act(torch.randn(3))


def test_tracking_twice_is_an_error() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 6), nn.ReLU())
    for first, second in ((model, model), (model, model[0]), (model[0], model)):
        with (
            track(first),
            pytest.raises(RuntimeError, match=r"tracked already; call remove\(\)"),
        ):
            track(second)
        track(second).remove()


def test_a_model_without_rectifiers_is_an_error() -> None:
    with pytest.raises(ValueError, match="Linear has no rectifier to track"):
        track(nn.Linear(4, 6))
    with pytest.raises(ValueError, match="has no rectifier to track"):
        track(nn.Sequential(nn.Linear(4, 6), nn.Tanh()))


# ---- the report


def tracked_mlp(**options: Any) -> tuple[nn.Module, EntropyTracker]:
    model = models.build(options.pop("name", "mlp"), (1, 4, 4), 3, **options)
    return model, track(model)


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
