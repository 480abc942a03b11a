"""Tracking counts every call of a rectifier once, whatever its shape and its mask."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import ALL_KINDS, INPLACE_KINDS
from torch import Tensor, nn
from tracking import (
    FUNCTIONS,
    Layers,
    Masked,
    assert_same_step,
    module,
    reference_counts,
    train_step,
)

from layer_collapse import models
from layer_collapse.measure.rectifiers import KINDS, Kind
from layer_collapse.measure.tracker import track
from layer_collapse.ops.rectify import POSITIONS, counts_of


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
