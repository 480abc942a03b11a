"""The way past the dispatcher: when a masked optimiser takes it, and that it changes no bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layer_collapse import _C
from layer_collapse.prune.masks import Masks
from layer_collapse.prune.optim import MaskedAdamW, MaskedSGD

KINDS = [
    (MaskedSGD, {}),
    (MaskedSGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    (MaskedSGD, {"momentum": 0.9, "nesterov": True}),
    (MaskedAdamW, {}),
    (MaskedAdamW, {"amsgrad": True, "betas": (0.3, 0.9), "maximize": True}),
]
BOTH = [(MaskedSGD, {"momentum": 0.9}), (MaskedAdamW, {})]
NAMES = {MaskedSGD: "masked_sgd_memory", MaskedAdamW: "masked_adamw_memory"}


def case(make, kwargs, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 33), nn.Linear(33, 9, bias=False)).to(dtype)
    masks = Masks({"0": net[0].weight, "1": net[1].weight})
    masks.prune_({"0": 2000, "1": 250})
    return net, masks, make(net.parameters(), lr=0.01, masks=masks, **kwargs)


def give_gradients(net, seed):
    torch.manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)


def count_calls(monkeypatch, make):
    """Grows by one with each step that goes past the dispatcher."""
    calls = []
    native = getattr(_C, NAMES[make])

    def called(*args):
        calls.append(args)
        native(*args)

    monkeypatch.setattr(_C, NAMES[make], called)
    return calls


def everything(net, optimizer):
    for parameter in net.parameters():
        yield parameter
        for key in sorted(optimizer.state[parameter]):
            yield optimizer.state[parameter][key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "kwargs"), KINDS)
def test_equals_the_op(make, kwargs, dtype, monkeypatch):
    (net, _, planned), (other, _, plain) = (case(make, kwargs, dtype) for _ in range(2))
    calls = count_calls(monkeypatch, make)
    for step in range(5):
        give_gradients(net, step)
        give_gradients(other, step)
        planned.step()
        plain._plans.clear()  # so that it takes the op
        plain.step()
    assert len(calls) == 4
    for mine, theirs in zip(everything(net, planned), everything(other, plain), strict=True):
        assert torch.equal(mine, theirs)
        assert mine._version == theirs._version


def strided_gradient(net, optimizer, masks):
    net[0].weight.grad = torch.randn(70, 33).t()


def no_gradient(net, optimizer, masks):
    net[0].bias.grad = None


def written_weight(net, optimizer, masks):
    with torch.no_grad():
        net[0].weight.fill_(1)


def exchanged_weight(net, optimizer, masks):
    net[0].weight.data = torch.ones(33, 70)


def turned_weight(net, optimizer, masks):
    square = net[1].weight.data[:, :9]
    net[1].weight.data = square.t().contiguous().t().new_ones(33, 9).t()
    net[1].weight.grad = torch.randn(9, 33)


def exchanged_state(net, optimizer, masks):
    key = "momentum_buffer" if isinstance(optimizer, MaskedSGD) else "exp_avg"
    state = optimizer.state[net[0].weight]
    state[key] = torch.zeros_like(state[key])


def moved_state(net, optimizer, masks):
    key = "momentum_buffer" if isinstance(optimizer, MaskedSGD) else "exp_avg"
    state = optimizer.state[net[0].weight]
    state[key].data = torch.zeros_like(state[key])


def pruned(net, optimizer, masks):
    masks.prune_({"0": 10})


def loaded(net, optimizer, masks):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [
    strided_gradient,
    no_gradient,
    written_weight,
    exchanged_weight,
    turned_weight,
    exchanged_state,
    moved_state,
    pruned,
    loaded,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("make", "kwargs"), BOTH)
def test_leaves_a_changed_group_to_the_op(make, kwargs, change, monkeypatch):
    (net, masks, planned), (other, other_masks, plain) = (case(make, kwargs) for _ in range(2))
    calls = count_calls(monkeypatch, make)
    for step in range(5):
        for some, some_masks, optimizer in ((net, masks, planned), (other, other_masks, plain)):
            give_gradients(some, step)
            if step == 2:
                torch.manual_seed(9)
                change(some, optimizer, some_masks)
        before = len(calls)
        planned.step()
        if step == 2:
            assert len(calls) == before
        plain._plans.clear()
        plain.step()
    for mine, theirs in zip(everything(net, planned), everything(other, plain), strict=True):
        assert torch.equal(mine, theirs)
    masks.check_()


@pytest.mark.parametrize(("make", "kwargs"), BOTH)
def test_leaves_modes_to_the_op(make, kwargs, monkeypatch):
    net, _, optimizer = case(make, kwargs)
    calls = count_calls(monkeypatch, make)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    give_gradients(net, 0)
    optimizer.step()
    with Watch():
        optimizer.step()
    assert not calls
    assert any("masked" in str(func) for func in seen)
    optimizer.step()
    assert len(calls) == 1


@pytest.mark.parametrize(("make", "kwargs"), BOTH)
def test_is_seen_by_backward(make, kwargs, monkeypatch):
    net, _, optimizer = case(make, kwargs)
    calls = count_calls(monkeypatch, make)
    give_gradients(net, 0)
    optimizer.step()
    loss = (net[1].weight ** 2).sum()
    optimizer.step()
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", list(NAMES.values()))
def test_refuses_what_it_cannot_unpack(name):
    step = getattr(_C, name)
    numbers = [0.0] * 6
    message = f"^{name}: expected packed tensors, as many gradients and 6 numbers"
    for arguments in ([b"", [], *numbers[1:]], [b"", [1], *numbers], [bytes(63), [], *numbers]):
        with pytest.raises(TypeError, match=message):
            step(*arguments)
    with pytest.raises(TypeError):
        step(b"", [], *numbers[1:], "lr")
    assert step(b"", [], *numbers) is None
