"""The masked steps against their plain-PyTorch twins and against torch.optim."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from layer_collapse import _C
from layer_collapse.ops.masked_step import (
    apply_masks_,
    apply_masks_reference,
    masked_adamw_,
    masked_adamw_reference,
    masked_sgd_,
    masked_sgd_reference,
    unpack_reference,
)

ops = torch.ops.layer_collapse
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(0,), (), (1,), (31,), (32,), (33,), (5, 7), (70001,), (4, 6, 3, 3)]


def pack(alive):
    return torch.from_numpy(_C.pack_mask(alive.flatten().numpy()))


def random_mask(shape, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.rand(shape, generator=generator) >= sparsity)


def sgd_case(shape, dtype, sparsity, layout=torch.contiguous_format, seed=0, device="cpu"):
    torch.manual_seed(seed)
    words = random_mask(shape, sparsity, seed)
    weight = torch.randn(shape).to(dtype)
    grad = torch.randn(shape).to(dtype)
    if weight.dim() == 4:
        weight = weight.to(memory_format=layout)
    state = [torch.randn_like(weight).abs() for _ in range(3)]
    apply_masks_reference([weight, *state], [words] * 4)
    return weight.to(device), grad.to(device), [t.to(device) for t in state], words.to(device)


def copies(*tensors):
    return [tensor.clone() for tensor in tensors]


SGD_OPTIONS = [
    {
        "momentum": m,
        "dampening": d,
        "weight_decay": w,
        "nesterov": n,
        "maximize": x,
        "first_step": f,
    }
    for m, d, w, n, x, f in itertools.product(
        [0.0, 0.9], [0.0, 0.3], [0.0, 0.1], [False, True], [False, True], [False, True]
    )
    if not (n and (m == 0 or d != 0))
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_sgd_equals_twin(dtype, shape, sparsity, device):
    options = SGD_OPTIONS if math.prod(shape) < 1000 else SGD_OPTIONS[-3:]
    for kwargs in options:
        weight, grad, (buffer, *_), words = sgd_case(shape, dtype, sparsity, device=device)
        twin, twin_buffer = copies(weight, buffer)
        buffers, twin_buffers = ([buffer], [twin_buffer]) if kwargs["momentum"] else ([], [])
        masked_sgd_([weight], [grad], buffers, [words], lr=0.1, **kwargs)
        masked_sgd_reference([twin], [grad], twin_buffers, [words], lr=0.1, **kwargs)
        torch.testing.assert_close(weight, twin)
        torch.testing.assert_close(buffer, twin_buffer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_equals_twin(dtype, shape, amsgrad, maximize, device):
    for weight_decay, step, beta1 in [(0.0, 1, 0.9), (0.1, 7, 0.9), (0.1, 3, 0.3)]:
        weight, grad, state, words = sgd_case(shape, dtype, 0.5, device=device)
        twin, *twins = copies(weight, *state)
        kwargs = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize, "beta1": beta1}
        steps = [torch.tensor(float(step), device=device)]
        lists = [[t] for t in state[:2]] + [[state[2]] if amsgrad else []]
        twin_lists = [[t] for t in twins[:2]] + [[twins[2]] if amsgrad else []]
        masked_adamw_([weight], [grad], *lists, [words], steps, **kwargs)
        masked_adamw_reference([twin], [grad], *twin_lists, [words], steps, **kwargs)
        torch.testing.assert_close(weight, twin)
        for ours, theirs in zip(state, twins, strict=True):
            torch.testing.assert_close(ours, theirs)


# the device is the same for all examples of a test
same_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(same_device, max_examples=60, deadline=None)
@given(
    count=st.integers(0, 300),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    special=st.sampled_from([0.0, -0.0, math.inf, 1e-40, 65504.0]),
)
def test_sgd_special_values(count, sparsity, dtype, seed, special, device):
    case = sgd_case((count,), dtype, sparsity, seed=seed, device=device)
    weight, grad, (buffer, *_), words = case
    grad[::3] = special
    twin, twin_buffer = copies(weight, buffer)
    kwargs = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}
    masked_sgd_([weight], [grad], [buffer], [words], **kwargs)
    masked_sgd_reference([twin], [grad], [twin_buffer], [words], **kwargs)
    torch.testing.assert_close(weight, twin, equal_nan=True)
    torch.testing.assert_close(buffer, twin_buffer, equal_nan=True)


def holes(shape, kind, seed):
    """A mask with empty lines, words and rows among crowded and full ones."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(shape, generator=generator) >= {"sparse": 0.99, "mixed": 0.9}.get(kind, 0.5)
    if kind == "rows":
        alive &= torch.rand(shape[:1] + (1,) * (len(shape) - 1), generator=generator) > 0.8
    if kind == "mixed":  # stretches of both, so that skipped and whole spans take turns
        flat = alive.view(-1)
        flat[flat.numel() // 3 : flat.numel() // 2] = True
        flat[flat.numel() // 2 : flat.numel() * 2 // 3] = False
    return alive


@settings(same_device, max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(9000,), (70, 131), (33, 7, 3, 3), (17, 40, 5, 5), (20, 9, 2, 2)]),
    kind=st.sampled_from(["sparse", "mixed", "rows"]),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_lines_with_and_without_work(shape, kind, channels_last, dtype, seed, device):
    words = pack(holes(shape, kind, seed)).to(device)
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    weight, grad, state, _ = sgd_case(shape, dtype, 0.0, layout, seed, device)
    apply_masks_([weight, *state], [words] * 4)
    twin, *twins = copies(weight, *state)
    apply_masks_reference([twin, *twins], [words] * 4)
    assert torch.equal(weight, twin)
    grad[grad > 2] = math.inf
    scale = torch.tensor(3.0, device=device)
    kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "grad_scale": scale}
    masked_sgd_([weight], [grad], state[:1], [words], **kwargs)
    masked_sgd_reference([twin], [grad], twins[:1], [words], **kwargs)
    torch.testing.assert_close(weight, twin, equal_nan=True)
    steps = [torch.tensor(3.0, device=device)]
    masked_adamw_([weight], [grad], *[[t] for t in state], [words], steps, lr=0.1, maximize=True)
    masked_adamw_reference(
        [twin], [grad], *[[t] for t in twins], [words], steps, lr=0.1, maximize=True
    )
    for ours, theirs in zip([weight, *state], [twin, *twins], strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert ours[~unpack_reference(words, shape)].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_gradients_of_pruned_weights_do_not_spread(dtype, device):
    weight, grad, state, words = sgd_case((1000,), dtype, 0.5, device=device)
    alive = unpack_reference(words, weight.shape)
    grad[~alive] = math.nan
    masked_sgd_([weight], [grad], state[:1], [words], lr=0.1, momentum=0.9, weight_decay=0.1)
    lists = [[t] for t in state]
    masked_adamw_([weight], [grad], *lists, [words], [torch.tensor(1.0, device=device)], lr=0.1)
    for tensor in (weight, *state):
        assert tensor[~alive].eq(0).all()
        assert tensor.isfinite().all()


def test_first_step_zeroes_uninitialised_buffers(device):
    weight, grad, _, words = sgd_case((200,), torch.float32, 0.9, device=device)
    words[2] = 0
    apply_masks_([weight], [words])
    buffer = torch.full_like(weight, math.nan)
    masked_sgd_([weight], [grad], [buffer], [words], lr=0.1, momentum=0.9, first_step=True)
    assert buffer[~unpack_reference(words, (200,))].eq(0).all()
    assert buffer.isfinite().all()


def error(value, exact):
    return (value.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_half_error_is_at_most_twice_torchs(dtype, name, device):
    torch.manual_seed(0)
    start = torch.randn(5000).to(device, dtype)
    grads = [torch.randn(5000).to(device, dtype) for _ in range(5)]
    make = {
        "sgd": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.01),
    }[name]
    results = []
    for kind in (torch.float64, dtype):
        parameter = torch.nn.Parameter(start.to(kind, copy=True))
        optimizer = make(parameter)
        for grad in grads:
            parameter.grad = grad.to(kind)
            optimizer.step()
        results.append(parameter.detach())
    exact, plain = results
    weight, state = start.clone(), [torch.zeros_like(start) for _ in range(2)]
    none = torch.empty(0, dtype=torch.int32, device=device)
    for step, grad in enumerate(grads):
        if name == "sgd":
            masked_sgd_(
                [weight],
                [grad],
                state[:1],
                [none],
                lr=0.1,
                momentum=0.9,
                weight_decay=0.01,
                first_step=step == 0,
            )
        else:
            steps = [torch.tensor(step + 1.0, device=device)]
            masked_adamw_(
                [weight],
                [grad],
                state[:1],
                state[1:],
                [],
                [none],
                steps,
                lr=0.1,
                weight_decay=0.01,
            )
    assert error(weight, exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_follows_logical_order(layout, dtype, device):
    """A channels_last weight gives what a contiguous one with the same mask gives."""
    shape = (33, 20, 3, 3)
    plain, grad, state, words = sgd_case(shape, dtype, 0.7, device=device)

    def lay_out(tensor):
        if layout == "channels_last":
            return tensor.clone(memory_format=torch.channels_last)
        return tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    other, other_state = lay_out(plain), [lay_out(t) for t in state]
    assert not other.is_contiguous()
    for grads in (grad, lay_out(grad), torch.stack([grad, grad], -1)[..., 0]):
        kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        masked_sgd_([plain], [grad], state[:1], [words], **kwargs)
        masked_sgd_([other], [grads], other_state[:1], [words], **kwargs)
        steps = [torch.tensor(2.0, device=device)]
        masked_adamw_([plain], [grad], *[[t] for t in state], [words], steps, lr=0.1)
        masked_adamw_([other], [grads], *[[t] for t in other_state], [words], steps, lr=0.1)
    torch.testing.assert_close(other, plain, rtol=0, atol=0)
    for ours, theirs in zip(other_state, state, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    garbage = lay_out(torch.full(shape, math.nan, dtype=dtype, device=device))
    apply_masks_([garbage], [words])
    assert torch.equal(garbage.isnan(), unpack_reference(words, shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply_equals_twin(dtype, shape, device):
    words = random_mask(shape, 0.5).to(device)
    tensor = torch.randn(shape).to(device, dtype)
    twin = tensor.clone()
    apply_masks_([tensor], [words])
    apply_masks_reference([twin], [words])
    assert torch.equal(tensor, twin)


def test_grad_scale_and_found_inf(device):
    weight, grad, (buffer, *_), words = sgd_case((100,), torch.float32, 0.5, device=device)
    scaled, buffer_scaled = copies(weight, buffer)
    kwargs = {"lr": 0.1, "momentum": 0.9}
    masked_sgd_([weight], [grad], [buffer], [words], **kwargs)
    masked_sgd_(
        [scaled],
        [grad * 8],
        [buffer_scaled],
        [words],
        grad_scale=torch.tensor(8.0, device=device),
        found_inf=torch.tensor(0.0, device=device),
        **kwargs,
    )
    assert torch.equal(weight, scaled)
    before = copies(weight, buffer)
    for found in (1.0, 2.0, math.nan):
        found_inf = torch.tensor(found, device=device)
        masked_sgd_([weight], [grad], [buffer], [words], found_inf=found_inf, **kwargs)
        assert torch.equal(weight, before[0])
        assert torch.equal(buffer, before[1])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_in_a_tensor_is_that_number(name, dtype, device):
    """To the bit, and read at every step."""
    weight, grad, state, words = sgd_case((5, 70), torch.float32, 0.5, device=device)
    twin, *twins = copies(weight, *state)
    rate = torch.zeros((), dtype=dtype, device=device)
    step = torch.tensor(3.0, device=device)
    for value in (0.1, 0.0, 0.03):
        rate.fill_(value)
        for own, kept, lr in ((weight, state, rate), (twin, twins, float(rate))):
            if name == "sgd":
                masked_sgd_([own], [grad], kept[:1], [words], lr=lr, momentum=0.9)
            else:
                masked_adamw_([own], [grad], kept[:1], kept[1:2], [], [words], [step], lr=lr)
        assert torch.equal(weight, twin)
    assert float((weight - sgd_case((5, 70), torch.float32, 0.5, device=device)[0]).abs().sum()) > 0


def test_several_threads_equal_one():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            cases = [sgd_case((n,), torch.float32, 0.6, seed=n) for n in (200003, 0, 5, 90000)]
            params, grads, states, masks = (list(column) for column in zip(*cases, strict=True))
            lists = [[state[i] for state in states] for i in range(3)]
            masked_sgd_(params, grads, lists[0], masks, lr=0.1, momentum=0.9)
            masked_adamw_(params, grads, *lists, masks, [torch.tensor(3.0)] * 4, lr=0.1)
            results.append([*params, *itertools.chain(*lists)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("op", ["sgd", "adamw", "apply"])
def test_backward_notices_the_write(op, device):
    weight = torch.randn(40, device=device, requires_grad=True)
    loss = (weight**2).sum()
    grad, state = torch.ones(40, device=device), torch.zeros(40, device=device)
    words = random_mask((40,), 0.5).to(device)
    with torch.no_grad():
        if op == "sgd":
            masked_sgd_([weight], [grad], [], [words], lr=0.1)
        elif op == "adamw":
            steps = [torch.tensor(1.0, device=device)]
            masked_adamw_([weight], [grad], [state], [state.clone()], [], [words], steps, lr=0.1)
        else:
            apply_masks_([weight], [words])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout, device):
    case = sgd_case((3, 5, 3, 3), torch.float32, 0.5, layout, device=device)
    weight, grad, state, words = case
    number = torch.tensor(1.0, device=device)
    torch.library.opcheck(
        ops.masked_sgd_.default,
        (
            [weight],
            [grad],
            state[:1],
            [words],
            0.1,
            0.9,
            0.0,
            0.1,
            True,
            False,
            False,
            number,
            None,
            number,
        ),
    )
    torch.library.opcheck(
        ops.masked_adamw_.default,
        (
            [weight],
            [grad],
            state[:1],
            state[1:2],
            state[2:],
            [words],
            [number],
            0.1,
            0.9,
            0.99,
            1e-8,
            0.1,
            False,
            number,
            number,
            number,
        ),
    )
    torch.library.opcheck(ops.apply_masks_.default, ([weight, grad], [words, words]))


def test_empty_lists_call_no_op():
    """An op without a tensor has no device to run on; one number alone must not bring one in."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    number = torch.tensor(1.0)
    with Watch():
        masked_sgd_([], [], [], [], lr=0.1, grad_scale=number, found_inf=number)
        masked_adamw_([], [], [], [], [], [], [], lr=0.1, grad_scale=number, found_inf=number)
        apply_masks_([], [])
        assert called == []
        apply_masks_([torch.ones(1)], [torch.zeros(1, dtype=torch.int32)])
    assert ops.apply_masks_.default in called


REFUSALS = [
    ({"masks": []}, r"masks must hold one tensor per weight tensor \(got 0 for 1\)"),
    ({"grads": []}, r"grads must hold one tensor per weight tensor \(got 0 for 1\)"),
    ({"buffers": []}, r"momentum_buffers must hold one tensor per weight tensor \(got 0 for 1\)"),
    ({"params": [torch.zeros(40, dtype=torch.int32)]}, r"params\[0\] must be float32.*got Int"),
    ({"params": [torch.zeros(80)[::2]]}, r"params\[0\] must be dense, without gaps"),
    ({"params": [torch.zeros(1).expand(40)]}, r"params\[0\] must be dense, without gaps"),
    ({"grads": [torch.zeros(41)]}, r"grads\[0\] must have the shape and dtype.*got \[41\] Float"),
    ({"grads": [torch.zeros(40).double()]}, r"grads\[0\] must have the shape and dtype"),
    ({"buffers": [torch.zeros(40).half()]}, r"momentum_buffers\[0\] must have the shape, strides"),
    ({"buffers": [torch.zeros(80)[::2]]}, r"momentum_buffers\[0\] must have the shape, strides"),
    ({"masks": [torch.zeros(2)]}, r"masks\[0\] must be int32 \(got Float\)"),
    (
        {"masks": [torch.zeros(3, dtype=torch.int32)]},
        r"masks\[0\] must be contiguous of shape \[2\] for 40 weights.*got shape \[3\]",
    ),
    ({"masks": [torch.zeros(4, dtype=torch.int32)[::2]]}, r"masks\[0\] must be contiguous"),
    (
        {"masks": [torch.tensor([0, 256], dtype=torch.int32)]},
        r"masks\[0\] must have no bit set beyond its 40 weights",
    ),
    ({"momentum": 0.0}, r"momentum_buffers must be empty without momentum \(got 1\)"),
    ({"found_inf": torch.zeros(2)}, r"found_inf must hold one number \(got 2\)"),
    ({"grad_scale": torch.ones((), dtype=torch.int32)}, r"grad_scale must be float32 or float64"),
    ({"lr": torch.ones(2)}, r"lr_scale must hold one number \(got 2\)"),
    ({"lr": torch.ones((), dtype=torch.int64)}, r"lr_scale must be float32 or float64"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_sgd_refuses(change, message):
    words = torch.tensor([-1, 255], dtype=torch.int32)
    case = {
        "params": [torch.ones(40)], "grads": [torch.ones(40)], "buffers": [torch.ones(40)],
        "masks": [words], "momentum": 0.9, "found_inf": None, "grad_scale": None, "lr": 0.1,
        **change,
    }  # fmt: skip
    before = [p.clone() for p in case["params"]]
    with pytest.raises(RuntimeError, match="^masked_sgd_: " + message):
        masked_sgd_(
            case["params"], case["grads"], case["buffers"], case["masks"], lr=case["lr"],
            momentum=case["momentum"], found_inf=case["found_inf"], grad_scale=case["grad_scale"],
        )  # fmt: skip
    assert all(map(torch.equal, before, case["params"]))


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (2, [], r"exp_avgs must hold one tensor"),
        (3, [torch.ones(3)], r"exp_avg_sqs\[0\] must have the shape"),
        (4, [torch.ones(3)], r"max_exp_avg_sqs\[0\] must have the shape"),
        (6, [], r"steps must hold one tensor"),
        (6, [torch.tensor(0.0)], r"steps\[0\] must be at least 1 \(got 0\)"),
    ],
)
def test_adamw_refuses(place, wrong, message):
    lists = [[torch.ones(4)] for _ in range(5)]
    lists += [[torch.tensor([15], dtype=torch.int32)], [torch.tensor(1.0)]]
    lists[place] = wrong
    with pytest.raises(RuntimeError, match="^masked_adamw_: " + message):
        masked_adamw_(*lists, lr=0.1)


def test_apply_refuses():
    with pytest.raises(RuntimeError, match=r"^apply_masks_: tensors\[0\] must be float32"):
        apply_masks_([torch.ones(3, dtype=torch.int64)], [torch.zeros(1, dtype=torch.int32)])
