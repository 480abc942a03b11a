"""The fused rectifier gives torch's bits, torch's gradients and exact counts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ALL_KINDS,
    INPLACE_KINDS,
    assert_same_bits,
    call_of,
    reference_of,
    sample,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from layer_collapse import _C
from layer_collapse.measure.rectifiers import KINDS, Call, Kind
from layer_collapse.ops.rectify import (
    COUNT,
    FLAGS,
    HEADER,
    LIVE,
    POSITIONS,
    apply_torch,
    counts_of,
    new_ledger,
    rectify,
    rectify_reference,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Make = Callable[[torch.dtype], Tensor]


def _expanded(dtype: torch.dtype) -> Tensor:
    return sample(4, 1, 3, dtype=dtype).expand(4, 5, 3)


#: name -> (x of a dtype, its channel dim)
LAYOUTS: dict[str, tuple[Make, int]] = {
    "vector": (lambda d: sample(7, dtype=d), 0),
    "one element": (lambda d: sample(1, dtype=d), 0),
    "one element, 4 dims": (lambda d: sample(1, 1, 1, 1, dtype=d), 1),
    "matrix": (lambda d: sample(33, 17, dtype=d), 1),
    "matrix, dim 0": (lambda d: sample(33, 17, dtype=d), 0),
    "tokens": (lambda d: sample(3, 5, 7, dtype=d), -1),
    "image": (lambda d: sample(3, 5, 4, 6, dtype=d), 1),
    "image, dim -1": (lambda d: sample(3, 5, 4, 6, dtype=d), -1),
    "volume": (lambda d: sample(2, 3, 4, 3, 2, dtype=d), 1),
    "channels_last": (
        lambda d: sample(3, 5, 4, 6, dtype=d).to(memory_format=torch.channels_last),
        1,
    ),
    "channels_last, one channel": (
        lambda d: sample(3, 1, 4, 6, dtype=d).to(memory_format=torch.channels_last),
        1,
    ),
    "channels_last, dim 2": (
        lambda d: sample(3, 5, 4, 6, dtype=d).to(memory_format=torch.channels_last),
        2,
    ),
    "transposed": (lambda d: sample(9, 5, dtype=d).t(), 1),
    "permuted": (lambda d: sample(3, 5, 4, 6, dtype=d).permute(2, 0, 3, 1), 1),
    "sliced": (lambda d: sample(6, 10, 8, dtype=d)[::2, 1:9:3, 1:], 1),
    "sliced, transposed": (lambda d: sample(6, 10, 8, dtype=d)[:, ::2].transpose(0, 2), 1),
    "offset": (lambda d: sample(9, 5, dtype=d)[3:], 1),
    "expanded": (_expanded, 1),
    "expanded rows": (lambda d: sample(1, 6, dtype=d).expand(5, 6), 1),
    "expanded scalar": (lambda d: sample(1, dtype=d).expand(3, 4, 2), 1),
    "overlapping": (lambda d: sample(8, dtype=d).as_strided((4, 3), (1, 2)), 1),
    "odd strides of size 1": (lambda d: sample(6, dtype=d).as_strided((6, 1, 1), (1, 99, 7)), 1),
    "no sample": (lambda d: sample(0, 5, 4, dtype=d), 1),
    "no position": (lambda d: sample(3, 5, 0, dtype=d), 1),
    "no channel": (lambda d: sample(3, 0, 4, dtype=d), 1),
    "one channel": (lambda d: sample(50, 1, dtype=d), 1),
    "4099 channels": (lambda d: sample(2, 4099, dtype=d), 1),
    "4099 channels of rows": (lambda d: sample(2, 4099, 3, dtype=d), 1),
    "over a segment": (lambda d: sample(1, 2, 32768 + 7, dtype=d), 1),
    "one segment": (lambda d: sample(1, 3, 32768, dtype=d), 1),
    "many rows": (lambda d: sample(40000, 2, dtype=d), 1),
}


def there(x: Tensor, device: torch.device) -> Tensor:
    """The same values with the same strides, which moving alone would pack."""
    if device.type == "cpu":
        return x
    base = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device=device)
    base.copy_(x.as_strided((base.numel(),), (1,), 0))
    return base.as_strided(x.shape, x.stride(), x.storage_offset())


def run(
    kind: Kind, x: Tensor, channel_dim: int, valid: Tensor | None = None, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    ledger = new_ledger(kind, x.shape[channel_dim], x.device)
    return rectify(call_of(kind, x, channel_dim, inplace), ledger, channel_dim, valid), ledger


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_output_and_counts_are_those_of_plain_torch(
    kind: Kind, dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    make, channel_dim = LAYOUTS[layout]
    with torch.device("cpu"):
        x = make(dtype)
    x = there(x, device)
    before = x.clone()
    expected, reference = reference_of(kind, x, channel_dim)
    y, ledger = run(kind, x, channel_dim)
    assert_same_bits(y, expected)
    assert torch.equal(ledger, reference)
    assert_same_bits(x.clone(), before)

    valid = torch.rand([s for d, s in enumerate(x.shape) if d != channel_dim % x.dim()]) < 0.6
    valid = valid.to(device)
    _, reference = reference_of(kind, x, channel_dim, valid)
    y, ledger = run(kind, x, channel_dim, valid)
    assert_same_bits(y, expected)
    assert torch.equal(ledger, reference)


@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if "expand" not in name and name != "overlapping"]
)
@pytest.mark.parametrize("kind", INPLACE_KINDS, ids=lambda k: k.name)
def test_in_place_is_the_same_and_returns_x(kind: Kind, layout: str, device: torch.device) -> None:
    make, channel_dim = LAYOUTS[layout]
    for dtype in DTYPES:
        x, plain = (there(make(dtype), device) for _ in range(2))
        ledger, reference = (new_ledger(kind, x.shape[channel_dim], device) for _ in range(2))
        y = rectify(call_of(kind, x, channel_dim, True), ledger, channel_dim)
        expected = rectify_reference(
            call_of(kind, plain, channel_dim, True), reference, channel_dim
        )
        assert y is x
        assert_same_bits(y, expected)
        assert torch.equal(ledger, reference)


@pytest.mark.parametrize("kind", INPLACE_KINDS, ids=lambda k: k.name)
def test_in_place_touches_nothing_between_strided_elements(
    kind: Kind, device: torch.device
) -> None:
    base = sample(4, 6).to(device)
    plain = base.clone()
    run(kind, base[:, ::2], 1, inplace=True)
    apply_torch(call_of(kind, plain[:, ::2], 1, True))
    assert_same_bits(base, plain)


def test_in_place_on_expanded_memory_is_refused(device: torch.device) -> None:
    x = torch.randn(3, 1, device=device).expand(3, 4)
    ledger = new_ledger(KINDS["relu"], 4, device)
    with pytest.raises(RuntimeError, match=r"must not be expanded \(dim 1 has stride 0\)"):
        rectify(Call(KINDS["relu"], x, inplace=True), ledger, 1)
    assert not ledger[POSITIONS:].any()


@st.composite
def strided_inputs(draw: st.DrawFn) -> tuple[Tensor, int, Tensor | None]:
    """x of any rank, order and gaps with the values that matter, a channel dim and a mask."""
    rank = draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(0, 5), min_size=rank, max_size=rank))
    steps = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    dtype = draw(st.sampled_from(DTYPES))
    base = sample(
        *(s * t for s, t in zip(shape, steps, strict=True)),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )
    x = base[tuple(slice(None, None, step) for step in steps)]
    x = x.permute(draw(st.permutations(range(rank))))
    channel_dim = draw(st.integers(-rank, rank - 1))
    valid = None
    if draw(st.booleans()):
        positions = [s for d, s in enumerate(x.shape) if d != channel_dim % rank]
        order = draw(st.permutations(range(rank - 1)))
        mask = torch.rand([positions[d] for d in order]) < 0.5
        valid = mask.permute([order.index(d) for d in range(rank - 1)])
    return x, channel_dim, valid


# the device is the same for all examples of a test
same_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(same_device, max_examples=150, deadline=None, derandomize=True)
@given(kind=st.sampled_from(ALL_KINDS), inputs=strided_inputs())
def test_any_strides_channel_dim_and_mask(
    kind: Kind, inputs: tuple[Tensor, int, Tensor | None], device: torch.device
) -> None:
    x, channel_dim, valid = inputs
    x = there(x, device)
    valid = None if valid is None else there(valid, device)
    expected, reference = reference_of(kind, x, channel_dim, valid)
    y, ledger = run(kind, x, channel_dim, valid)
    assert_same_bits(y, expected)
    assert torch.equal(ledger, reference)


@settings(same_device, max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(ALL_KINDS),
    values=st.lists(st.floats(width=32), min_size=1, max_size=70),
    channels=st.integers(1, 4),
)
def test_any_values(kind: Kind, values: list[float], channels: int, device: torch.device) -> None:
    x = torch.tensor(values).repeat(channels).view(-1, channels).to(device)
    expected, reference = reference_of(kind, x, 1)
    y, ledger = run(kind, x, 1)
    assert_same_bits(y, expected)
    assert torch.equal(ledger, reference)


def test_counts_worked_by_hand() -> None:
    nan = float("nan")
    x = torch.tensor([[1.0, -0.0], [0.0, -2.0], [7.0, nan], [-3.0, 3.0]])
    _, ledger = run(KINDS["relu"], x, 1)
    assert ledger.tolist() == [COUNT, 4, 0, 0, 0, 0, 2, 1, 1, 1, 0, 1]
    _, ledger = run(KINDS["relu6"], x, 1)
    assert ledger.tolist() == [COUNT, 4, 0, 0, 0, 0, 2, 1, 1, 1, 0, 1, 1, 0]
    _, ledger = run(KINDS["hardswish"], x, 1)  # -3 and 3 themselves belong to both pieces
    assert ledger.tolist() == [COUNT, 4, 0, 0, 0, 0, 2, 1, 1, 1, 0, 1, 2, 2]


def test_counts_add_up_over_calls_and_stop_when_disabled() -> None:
    kind = KINDS["relu"]
    ledger = new_ledger(kind, 3)
    batches = [torch.randn(5, 3) for _ in range(3)]
    for batch in batches:
        rectify(Call(kind, batch), ledger, 1)
    _, reference = reference_of(kind, torch.cat(batches), 1)
    assert torch.equal(ledger, reference)
    ledger[FLAGS] = 0
    y = rectify(Call(kind, batches[0]), ledger, 1)
    assert torch.equal(y, batches[0].relu())
    assert torch.equal(ledger[POSITIONS:], reference[POSITIONS:])


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_one_thread_and_two_agree(kind: Kind) -> None:
    for shape, layout in (((16, 5, 9001), None), ((8, 24, 40, 40), torch.channels_last)):
        x = sample(*shape)
        if layout is not None:
            x = x.to(memory_format=layout)
        valid = torch.rand([s for d, s in enumerate(shape) if d != 1]) < 0.5
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append((*run(kind, x, 1), *run(kind, x, 1, valid)))
        for other in results[1:]:
            assert_same_bits(other[0], results[0][0])
            assert torch.equal(other[1], results[0][1])
            assert torch.equal(other[3], results[0][3])


def test_prelu_slopes_stay_on_dim_one_where_neurons_lie_elsewhere() -> None:
    kind = KINDS["prelu"]
    x = torch.randn(2, 6, 6, requires_grad=True)  # as many slopes as neurons, on another dim
    weight = torch.linspace(-1, 2, 6, requires_grad=True)
    ledger, reference = new_ledger(kind, 6), new_ledger(kind, 6)
    expected = rectify_reference(Call(kind, x, weight=weight), reference, -1)
    y = rectify(Call(kind, x, weight=weight), ledger, -1)
    assert_same_bits(y, expected)
    assert torch.equal(ledger, reference)
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weight), seed)
    for a, b in zip(got, torch.autograd.grad(expected, (x, weight), seed), strict=True):
        assert torch.equal(a, b)


# ---- autograd


def gradients(
    apply: Callable[[Call], Tensor], kind: Kind, base: Tensor, inplace: bool
) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients for x and PReLU's weight, of a rectifier between two products."""
    x = base.clone().requires_grad_()
    call = call_of(kind, x * 1.0, 1, inplace)
    inputs = [x]
    if call.weight is not None:
        call = replace(call, weight=call.weight.requires_grad_())
        assert call.weight is not None
        inputs.append(call.weight)
    y = apply(call)
    seed = torch.linspace(-2, 3, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return y.detach(), list(torch.autograd.grad(y * 1.0, inputs, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "inplace"),
    [(kind, False) for kind in ALL_KINDS] + [(kind, True) for kind in INPLACE_KINDS],
    ids=lambda value: getattr(value, "name", "in place" if value is True else ""),
)
def test_gradients_have_torchs_bits(
    kind: Kind, dtype: torch.dtype, inplace: bool, device: torch.device
) -> None:
    for on_cpu in (
        sample(5, 7, dtype=dtype),
        sample(3, 7, 4, 5, dtype=dtype),
        sample(3, 7, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
    ):
        x = there(on_cpu, device)
        ledger = new_ledger(kind, 7, device)
        y, got = gradients(lambda call, to=ledger: rectify(call, to, 1), kind, x, inplace)
        expected_y, expected = gradients(apply_torch, kind, x, inplace)
        assert_same_bits(y, expected_y)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)
        assert torch.equal(ledger, reference_of(kind, x, 1)[1])


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_gradcheck_twice(kind: Kind, device: torch.device) -> None:
    x = torch.tensor([[-4.0, -2.0, -0.4], [0.5, 2.0, 7.0]], dtype=torch.float64, device=device)
    x.requires_grad_()
    ledger = new_ledger(kind, 3, device)
    if kind.name == "prelu":
        weight = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64, device=device)
        weight.requires_grad_()

        def prelu(x: Tensor, weight: Tensor) -> Tensor:
            return rectify(Call(kind, x, weight=weight), ledger, 1)

        assert torch.autograd.gradcheck(prelu, (x, weight))
        assert torch.autograd.gradgradcheck(prelu, (x, weight))
        return

    def function(x: Tensor) -> Tensor:
        return rectify(call_of(kind, x), ledger, 1)

    def in_place(x: Tensor) -> Tensor:
        return rectify(call_of(kind, x.clone(), inplace=True), ledger, 1)

    variants = [function, in_place] if kind in INPLACE_KINDS else [function]
    for variant in variants:
        assert torch.autograd.gradcheck(variant, (x,))
        assert torch.autograd.gradgradcheck(variant, (x,))


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "silu", "hardswish"])
def test_in_place_invalidates_what_was_saved_before(name: str, device: torch.device) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    hidden = x.exp()  # saves its result, which is then changed
    y, _ = run(KINDS[name], hidden, 1, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_a_leaf_is_refused_as_in_torch(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        run(KINDS["relu"], x, 1, inplace=True)


def test_in_place_on_a_view_reaches_its_base(device: torch.device) -> None:
    grads = []
    for tracked in (True, False):
        x = torch.linspace(-1, 1, 12, device=device).view(3, 4).requires_grad_()
        base = x * 1.0
        if tracked:
            run(KINDS["relu"], base[:, :2], 1, inplace=True)
        else:
            base[:, :2].relu_()
        (base * base).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_forward_mode_passes_tangents_and_counts(kind: Kind, device: torch.device) -> None:
    x, tangent = (torch.randn(5, 3, device=device) for _ in range(2))
    ledger = new_ledger(kind, 3, device)
    got = torch.func.jvp(lambda x: rectify(call_of(kind, x), ledger, 1), (x,), (tangent,))
    expected = torch.func.jvp(lambda x: apply_torch(call_of(kind, x)), (x,), (tangent,))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert expected[1].any()
    assert torch.equal(ledger, reference_of(kind, x, 1)[1])


def test_no_graph_without_grad_mode() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        y, _ = run(KINDS["relu"], x, 1)
    assert not y.requires_grad
    with torch.inference_mode():
        y, ledger = run(KINDS["relu"], x, 1)
    assert y.is_inference()
    assert ledger[POSITIONS] == 3


# ---- the ops themselves


def op_arguments(kind: Kind, x: Tensor, valid: Tensor | None) -> tuple[Any, ...]:
    call = call_of(kind, x)
    ledger = new_ledger(kind, x.shape[1], x.device)
    return (x, ledger, kind.code, 1, call.slope, call.weight, valid)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_opcheck(kind: Kind, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, device=device)
    valid = torch.tensor([[True, False, True, True]] * 2, device=device)
    for arguments in (
        op_arguments(kind, x, None),
        op_arguments(kind, x.transpose(0, 2)[:, :, :1], None),
        op_arguments(kind, x.half(), valid),
    ):
        torch.library.opcheck(torch.ops.layer_collapse.rectify.default, arguments)
        torch.library.opcheck(torch.ops.layer_collapse.rectify_.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_the_fake_has_the_strides_of_the_result(kind: Kind, layout: str) -> None:
    if layout == "odd strides of size 1" and kind.name in ("relu6", "prelu"):
        pytest.skip("torch's own fake of empty_like gives other strides than empty_like")
    make, channel_dim = LAYOUTS[layout]
    x = make(torch.float32)
    y, _ = run(kind, x, channel_dim)
    with torch._subclasses.FakeTensorMode() as mode:
        fake, _ = run(kind, mode.from_tensor(x), channel_dim)
    assert (fake.shape, fake.dtype) == (y.shape, y.dtype)
    assert fake.stride() == y.stride()


RELU, PRELU = KINDS["relu"].code, KINDS["prelu"].code


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 8}, r"kind must be 0 to 7 \(got 8\)"),
        ({"kind": -1}, r"kind must be 0 to 7 \(got -1\)"),
        ({"x": torch.ones(2, 3, dtype=torch.int32)}, r"x must be float32.*\(got Int\)"),
        ({"x": torch.ones(2, 3, dtype=torch.complex64)}, r"x must be float32"),
        ({"x": torch.tensor(1.0)}, r"x must have a channel dim"),
        ({"channel_dim": 2}, r"channel_dim must be a dim of x, -2 to 1 \(got 2\)"),
        ({"channel_dim": -3}, r"channel_dim must be a dim of x, -2 to 1 \(got -3\)"),
        ({"channel_dim": 0}, r"ledger must be .* 12 words for 2 channels \(got Long with 15 words"),
        ({"ledger": torch.zeros(11)}, r"ledger must be a contiguous int64 .*\(got Float"),
        ({"ledger": torch.zeros(22, dtype=torch.int64)[::2]}, r"ledger must be a contiguous"),
        ({"weight": torch.ones(1)}, r"weight belongs to PReLU and to no other kind \(got one\)"),
        ({"kind": PRELU}, r"weight belongs to PReLU and to no other kind \(got none for PReLU\)"),
        (
            {"kind": PRELU, "weight": torch.ones(2)},
            r"weight must have x's dtype and device and 1 or 3",
        ),
        (
            {"kind": PRELU, "weight": torch.ones(3).half()},
            r"weight must have x's dtype and device and 1 or 3",
        ),
        ({"valid": torch.ones(2)}, r"valid must be bool on x's device \(got Float\)"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"valid must have the shape of x without"),
        ({"valid": torch.ones(2, 1, dtype=torch.bool)}, r"valid must have the shape of x without"),
    ],
)
@pytest.mark.parametrize("op", ["rectify", "rectify_"])
def test_wrong_arguments_are_named(op: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 3),
        "ledger": new_ledger(KINDS["relu"], 3),
        "kind": RELU,
        "channel_dim": 1,
        "slope": 0.0,
        "weight": None,
        "valid": None,
    }
    with pytest.raises(RuntimeError, match=f"rectify: {message}"):
        getattr(torch.ops.layer_collapse, op)(**arguments | change)


def test_the_ledger_layout() -> None:
    for kind in ALL_KINDS:
        ledger = new_ledger(kind, 5)
        assert ledger.tolist() == [COUNT] + [0] * (HEADER - 1 + kind.rows * 5)
        assert counts_of(ledger, kind).shape == (kind.rows, 5)
        assert counts_of(ledger, kind).data_ptr() == ledger[HEADER:].data_ptr()


@st.composite
def mostly_ordered(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A tensor with at most one NaN, so that the loops take the way that looks for it once."""
    channels, positions = draw(st.integers(1, 150)), draw(st.integers(1, 40))
    inner = draw(st.sampled_from([1, 1, 3, 63, 64, 65, 130]))
    shape = (positions, channels, inner) if inner > 1 else (positions, channels)
    dtype = draw(st.sampled_from(DTYPES))
    x = sample(*shape, dtype=dtype, seed=draw(st.integers(0, 20)))
    x = torch.where(x.isnan(), torch.tensor(-0.0, dtype=dtype), x)
    if draw(st.booleans()):
        sign = draw(st.sampled_from([1.0, -1.0]))
        place = draw(st.integers(0, x.numel() - 1))
        x.view(-1)[place] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign))
    return x, 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mostly_ordered(), st.sampled_from(ALL_KINDS), st.integers(1, 2))
def test_values_in_order(case: tuple[Tensor, int], kind: Kind, threads: int) -> None:
    x, dim = case
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, ledger = run(kind, x.clone(), dim)
        expected, reference = reference_of(kind, x, dim)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(y, expected)
    assert torch.equal(ledger, reference)


@pytest.mark.parametrize("machine", ["avx2", "baseline"])
def test_older_machines_give_the_same(machine: str) -> None:
    """The loops of lesser instruction sets, which this machine would not choose."""
    names = ("rectify", "rectify_shapes", "batch_norm", "masked_step")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    chosen = (
        "values_in_order or worked_by_hand or any_strides or rectify_shapes or errors_are_at_most "
        "or agree_with_each_other or any_shape_layout or special_values or half_error"
    )
    code = (
        "import pytest, sys; from layer_collapse import _C; "
        f"assert _C.build_info()['cpu_capability'].lower() == {machine!r}; "
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{files!r}, '-k', {chosen!r}]))"
    )
    if _C.build_info()["cpu_capability"].lower() == "baseline" != machine:
        pytest.skip("this machine has no AVX2")
    environment = os.environ | {"LAYER_COLLAPSE_CPU": machine}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_two_threads_share_a_ledger() -> None:
    """rectify and bn_rectify count into one ledger at once: no count is lost."""
    channels, calls = 16384, 200  # much to add for little to count: the two meet all the time
    kind = KINDS["relu"]
    ledger = new_ledger(kind, channels)
    ledger[FLAGS] |= LIVE
    x = sample(2, channels)
    numbers = torch.zeros(channels), torch.ones(channels)
    start = threading.Barrier(2)

    def rectifies() -> None:
        start.wait()
        for _ in range(calls):
            rectify(call_of(kind, x, 1, False), ledger, 1)

    def normalises() -> None:
        start.wait()
        for _ in range(calls):
            torch.ops.layer_collapse.bn_rectify(
                x, None, None, *numbers, ledger, False, 0.1, 0.0, kind.code, 0.0
            )

    threads = [threading.Thread(target=target) for target in (rectifies, normalises)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _, alone = run(kind, x, 1)
    assert ledger[POSITIONS] == 2 * calls * alone[POSITIONS]
    assert torch.equal(ledger[HEADER:], 2 * calls * alone[HEADER:])
