"""The masked optimisers against torch.optim, and what keeps pruned weights at zero."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from layer_collapse.prune.masks import Masks
from layer_collapse.prune.optim import MaskedAdamW, MaskedSGD, keep_pruned

SGD = [
    {"momentum": m, "dampening": d, "weight_decay": w, "nesterov": n, "maximize": x}
    for m, d, w, n, x in itertools.product(
        [0.0, 0.9], [0.0, 0.5], [0.0, 0.1], [False, True], [False, True]
    )
    if not (n and (m == 0 or d != 0))
]
ADAMW = [
    {"weight_decay": w, "amsgrad": a, "maximize": x}
    for w, a, x in itertools.product([0.0, 0.1], [False, True], [False, True])
]
KINDS = [(MaskedSGD, torch.optim.SGD, k) for k in SGD]
KINDS += [(MaskedAdamW, torch.optim.AdamW, k) for k in ADAMW]
BOTH = [
    (MaskedSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (MaskedAdamW, torch.optim.AdamW, {"amsgrad": True}),
]


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)).to(dtype)


def masked_model(dtype=torch.float32, prune=True):
    net = model(dtype)
    masks = Masks({name: p for name, p in net.named_parameters() if p.dim() > 1})
    if prune:
        masks.prune_({"0.weight": 150, "3.weight": 20})
    return net, masks


def backward(net, seed=0, scale=1.0):
    torch.manual_seed(seed)
    dtype = net[0].weight.dtype
    net.zero_grad()
    (net(torch.randn(4, 3, 3, 3, dtype=dtype)).square().mean() * scale).backward()


def pruned_values(net, masks, optimizer):
    for name, parameter in net.named_parameters():
        if name in masks.names:
            dead = ~masks.bool_mask(name)
            yield parameter.detach()[dead]
            for key, value in optimizer.state[parameter].items():
                if key != "step":
                    yield value[dead]


def assert_pruned(net, masks, optimizer):
    assert not masks.is_dense
    for values in pruned_values(net, masks, optimizer):
        assert values.eq(0).all()


def assert_same_weights(net, other, **tolerance):
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "torchs", "kwargs"), KINDS)
def test_dense_equals_torch(ours, torchs, kwargs, dtype):
    net, masks = masked_model(dtype, prune=False)
    other = model(dtype)
    optimizer = ours(net.parameters(), lr=0.01, masks=masks, **kwargs)
    reference = torchs(other.parameters(), lr=0.01, **kwargs)
    for step in range(5):
        backward(net, step)
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            theirs.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    assert_same_weights(net, other)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        state, expected = optimizer.state[mine], reference.state[theirs]
        assert set(state) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("ours", "torchs", "kwargs"), KINDS)
def test_pruned_weights_stay_zero(ours, torchs, kwargs, layout):
    net, masks = masked_model()
    net.to(memory_format=layout)
    optimizer = ours(net.parameters(), lr=1e-3, masks=masks, **kwargs)
    for step in range(100):
        backward(net, step % 7)
        optimizer.step()
        if step == 50:
            masks.prune_({"0.weight": 30})
    masks.check_()
    assert_pruned(net, masks, optimizer)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("ours", "torchs", "kwargs"), BOTH)
def test_alive_weights_move_as_in_torch(ours, torchs, kwargs):
    net, masks = masked_model()
    other = copy.deepcopy(net)
    optimizer = ours(net.parameters(), lr=0.01, masks=masks, **kwargs)
    reference = torchs(other.parameters(), lr=0.01, **kwargs)
    twin_masks = masks.clone()
    twin_masks.rebind(dict(other.named_parameters()))
    keep_pruned(reference, twin_masks)
    for step in range(10):
        for some, stepper in ((net, optimizer), (other, reference)):
            backward(some, step)
            stepper.step()
    assert_same_weights(net, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ours", "torchs", "kwargs"), BOTH)
def test_pruning_between_steps_clears_state(ours, torchs, kwargs):
    net, masks = masked_model()
    optimizer = ours(net.parameters(), lr=0.01, masks=masks, **kwargs)
    backward(net)
    optimizer.step()
    masks.prune_where_("3.weight", torch.ones(5, 8, dtype=torch.bool))
    assert any(values.ne(0).any() for values in pruned_values(net, masks, optimizer))
    backward(net)
    optimizer.step()
    assert_pruned(net, masks, optimizer)


@pytest.mark.parametrize(("ours", "torchs", "kwargs"), BOTH)
def test_weights_written_from_outside_are_pruned_again(ours, torchs, kwargs):
    net, masks = masked_model()
    masks.prune_where_("3.weight", torch.ones(5, 8, dtype=torch.bool))
    optimizer = ours(net.parameters(), lr=0.01, masks=masks, **kwargs)
    backward(net)
    optimizer.step()
    net.load_state_dict(model().state_dict())
    backward(net)
    optimizer.step()
    assert_pruned(net, masks, optimizer)
    net[3].weight.data = torch.ones_like(net[3].weight)
    optimizer.step()
    assert_pruned(net, masks, optimizer)


@pytest.mark.parametrize(("ours", "torchs", "kwargs"), BOTH)
def test_layout_may_change_between_steps(ours, torchs, kwargs):
    net, masks = masked_model()
    other = copy.deepcopy(net)
    other_masks = masks.clone()
    other_masks.rebind(dict(other.named_parameters()))
    steppers = [ours(net.parameters(), lr=0.01, masks=masks, **kwargs)]
    steppers.append(ours(other.parameters(), lr=0.01, masks=other_masks, **kwargs))
    for step in range(4):
        if step == 2:
            other.to(memory_format=torch.channels_last)
        for some, stepper in zip((net, other), steppers, strict=True):
            backward(some, step)
            stepper.step()
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_weights(net, other)
    assert_pruned(other, other_masks, steppers[1])


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(
    ("ours", "torchs", "kwargs"),
    [*BOTH, (MaskedSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5})],
)
def test_grad_scaler(ours, torchs, kwargs, unscale):
    net, masks = masked_model()
    plain, plain_masks = masked_model()
    optimizer = ours(net.parameters(), lr=0.01, masks=masks, **kwargs)
    reference = ours(plain.parameters(), lr=0.01, masks=plain_masks, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        overflow = step in (0, 3)
        backward(net, step, scale=scaler.scale(torch.ones(())))
        if overflow:
            net[0].bias.grad[0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not overflow:
            backward(plain, step)
            reference.step()
        assert_same_weights(net, plain)
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        for key, value in reference.state[theirs].items():
            torch.testing.assert_close(optimizer.state[mine][key], value)
    assert not hasattr(optimizer, "found_inf")


def test_schedulers_groups_and_tensor_lr():
    net, masks = masked_model()
    other = copy.deepcopy(net)
    masks_of_other = masks.clone()
    masks_of_other.rebind(dict(other.named_parameters()))
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[3].parameters()}]
    lr = torch.tensor(0.05)
    optimizer = MaskedSGD(groups, lr=lr, momentum=0.9, masks=masks)
    groups = [{"params": other[0].parameters(), "lr": 0.1}, {"params": other[3].parameters()}]
    reference = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    keep_pruned(reference, masks_of_other)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (optimizer, reference)]
    for step in range(6):
        for some, stepper, schedule in zip(
            (net, other), (optimizer, reference), schedules, strict=True
        ):
            backward(some, step)
            stepper.step()
            schedule.step()
    assert_same_weights(net, other)


def test_closure_and_missing_gradients():
    net, masks = masked_model()
    optimizer = MaskedSGD(net.parameters(), lr=0.1, masks=masks)
    before = net[3].bias.detach().clone()

    def closure():
        backward(net)
        net[3].bias.grad = None
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert torch.equal(net[3].bias, before)
    assert optimizer.step() is None


@pytest.mark.parametrize(("ours", "torchs", "kwargs"), BOTH)
def test_state_dict_round_trip(ours, torchs, kwargs):
    net, masks = masked_model()
    optimizer = ours(net.parameters(), lr=0.01, masks=masks, **kwargs)
    for step in range(3):
        backward(net, step)
        optimizer.step()
    saved = pickle.loads(pickle.dumps((net.state_dict(), optimizer.state_dict())))
    assert saved[1]["state"][0]["mask"].dtype == torch.int32
    assert "mask" not in saved[1]["state"][1]
    other, other_masks = masked_model(prune=False)
    restored = ours(other.parameters(), lr=0.5, masks=other_masks, **kwargs)
    other.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    for name in masks.names:
        assert torch.equal(masks.words(name), other_masks.words(name))
    for step in range(3):
        for some, stepper in ((net, optimizer), (other, restored)):
            backward(some, step)
            stepper.step()
    assert_same_weights(net, other, rtol=0, atol=0)
    assert_pruned(other, other_masks, restored)


@pytest.mark.parametrize(("ours", "torchs", "kwargs"), BOTH)
@pytest.mark.parametrize("steps", [0, 3])
def test_state_dict_loads_into_torch(ours, torchs, kwargs, steps):
    net, masks = masked_model()
    other = copy.deepcopy(net)
    optimizer = ours(net.parameters(), lr=0.01, masks=masks, **kwargs)
    for step in range(steps):
        backward(net, step)
        optimizer.step()
    other.load_state_dict(net.state_dict())
    reference = torchs(other.parameters(), lr=0.5, **kwargs)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    backward(net)
    backward(other)
    optimizer.step()
    reference.step()
    for name, parameter in net.named_parameters():
        alive = masks.bool_mask(name) if name in masks.names else torch.ones_like(parameter).bool()
        theirs = dict(other.named_parameters())[name]
        torch.testing.assert_close(parameter[alive], theirs[alive])


@pytest.mark.parametrize(("ours", "torchs", "kwargs"), BOTH)
def test_state_dict_loads_from_torch(ours, torchs, kwargs):
    other = model()
    reference = torchs(other.parameters(), lr=0.01, **kwargs)
    for step in range(3):
        backward(other, step)
        reference.step()
    net, masks = masked_model()
    optimizer = ours(net.parameters(), lr=0.5, masks=masks, **kwargs)
    net.load_state_dict(other.state_dict())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert_pruned(net, masks, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01
    for some, stepper in ((net, optimizer), (other, reference)):
        for parameter in some.parameters():
            parameter.grad = torch.ones_like(parameter)
        stepper.step()
    for name, parameter in net.named_parameters():
        alive = masks.bool_mask(name) if name in masks.names else torch.ones_like(parameter).bool()
        torch.testing.assert_close(parameter[alive], dict(other.named_parameters())[name][alive])


def test_load_refuses_masks_and_changes_nothing():
    net, masks = masked_model()
    optimizer = MaskedSGD(net.parameters(), lr=0.1, momentum=0.9, masks=masks)
    backward(net)
    optimizer.step()
    for wrong, message in [
        (torch.zeros(7), r"mask of '0.weight' must be int32 of shape \[7\] \(got torch.float32"),
        (torch.zeros(6, dtype=torch.int32), r"must be int32 of shape \[7\]"),
        (torch.full((7,), -1, dtype=torch.int32), r"no bit set beyond its 216 weights"),
    ]:
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0]["mask"] = wrong
        state["state"][0]["momentum_buffer"].fill_(5)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert optimizer.state[net[0].weight]["momentum_buffer"].ne(5).all()
        assert masks.alive("0.weight") == 66
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["mask"] = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="parameter 1 must have a mask to load one"):
        optimizer.load_state_dict(state)


def test_deepcopy_keeps_masks_with_their_weights():
    net, masks = masked_model()
    optimizer = MaskedSGD(net.parameters(), lr=0.1, momentum=0.9, masks=masks)
    backward(net)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    backward(twin)
    twin_optimizer.step()
    assert twin_optimizer.masks is not masks
    assert_pruned(twin, twin_optimizer.masks, twin_optimizer)


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad", "SGD", "Adadelta"])
def test_keep_pruned(name):
    net, masks = masked_model()
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.01, weight_decay=0.1)
    backward(net)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"pruned weights must be 0\.0"):
        masks.check_()
    handle = keep_pruned(optimizer, masks)
    for step in range(10):
        backward(net, step)
        optimizer.step()
        assert_pruned(net, masks, optimizer)
    handle.remove()
    backward(net)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"pruned weights must be 0\.0"):
        masks.check_()


def test_scalar_weight_keeps_its_step():
    weight = nn.Parameter(torch.tensor(1.0))
    masks = Masks({"w": weight})
    masks.prune_({"w": 1})
    plain = torch.optim.AdamW([weight], lr=0.1)
    keep_pruned(plain, masks)
    for optimizer in (plain, MaskedAdamW([weight], lr=0.1, masks=masks)):
        weight.grad = torch.tensor(1.0)
        optimizer.step()
        masks.load_state_dict(masks.state_dict())
        optimizer.step()
        assert optimizer.state[weight]["step"] == 2
        assert weight == 0


def test_step_is_seen_by_backward():
    net, masks = masked_model()
    optimizer = MaskedSGD(net.parameters(), lr=0.1, masks=masks)
    backward(net)
    loss = (net[3].weight ** 2).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (MaskedSGD, {"lr": -1.0}, r"MaskedSGD: lr must be at least 0 \(got -1\)"),
        (MaskedSGD, {"lr": math.nan}, r"MaskedSGD: lr must be at least 0 \(got nan\)"),
        (MaskedSGD, {"lr": torch.zeros(2)}, r"MaskedSGD: lr must be one number \(got 2\)"),
        (MaskedSGD, {"momentum": -0.1}, r"momentum must be at least 0"),
        (MaskedSGD, {"weight_decay": -0.1}, r"weight_decay must be at least 0"),
        (MaskedSGD, {"nesterov": True}, r"nesterov needs a momentum and no dampening"),
        (MaskedAdamW, {"eps": -0.1}, r"MaskedAdamW: eps must be at least 0"),
        (MaskedAdamW, {"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\) \(got \(0.9, 1.0\)\)"),
    ],
)
def test_refuses_numbers(make, kwargs, message):
    net, masks = masked_model()
    with pytest.raises(ValueError, match=message):
        make(net.parameters(), masks=masks, **kwargs)


def test_refuses_foreign_masks_and_sparse_gradients():
    _, masks = masked_model()
    with pytest.raises(ValueError, match="MaskedSGD: masks must cover some of the parameters"):
        MaskedSGD(model().parameters(), lr=0.1, masks=masks)
    with pytest.raises(ValueError, match="keep_pruned: masks must cover some of the optimiser's"):
        keep_pruned(torch.optim.SGD(model().parameters(), lr=0.1), masks)
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = MaskedSGD(table.parameters(), lr=0.1, masks=Masks(dict(table.named_parameters())))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients must be dense \(got torch.sparse_coo\)"):
        optimizer.step()
