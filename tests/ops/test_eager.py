"""The way past the dispatcher gives what the op gives: bits, strides, gradients and counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import ALL_KINDS, assert_same_bits, call_of, reference_of, sample
from torch import Tensor, nn

import layer_collapse
from layer_collapse.measure.rectifiers import KINDS, Kind
from layer_collapse.ops import eager
from layer_collapse.ops.eager import rectify_eager
from layer_collapse.ops.rectify import POSITIONS, apply_torch, new_ledger

SHORT = [kind for kind in ALL_KINDS if kind.name != "prelu"]
IN_PLACE = [kind for kind in SHORT if kind.name in eager._NATIVE_IN_PLACE]
LAYOUTS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "tokens": (lambda: sample(5, 7, 33), -1),
    "image": (lambda: sample(3, 5, 9, 9), 1),
    "small planes": (lambda: sample(9, 5, 3, 3), 1),
    "channels_last": (lambda: sample(3, 5, 9, 9).to(memory_format=torch.channels_last), 1),
    "one channel": (lambda: sample(3, 1, 4, 6).to(memory_format=torch.channels_last), 1),
    "one element": (lambda: sample(1, 1, 1, 1), 1),
    "empty": (lambda: sample(0, 5, 2, 2), 1),
}


def shortcut(kind: Kind, x: Tensor, dim: int, inplace: bool = False) -> tuple[Tensor, Tensor]:
    ledger = new_ledger(kind, x.shape[dim])
    slope = call_of(kind, x).slope
    y = rectify_eager(kind, x, ledger, x.shape[dim], dim, slope, inplace)
    assert y is not None, "the shortcut was not taken"
    return y, ledger


@pytest.mark.parametrize("fused_from", [0, 1 << 18])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SHORT, ids=lambda kind: kind.name)
def test_outputs_counts_and_gradients(
    kind: Kind,
    dtype: torch.dtype,
    layout: str,
    fused_from: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager, "_FUSED_FROM", fused_from)
    make, dim = LAYOUTS[layout]
    x = make().to(dtype)
    y, ledger = shortcut(kind, x, dim)
    expected, reference = reference_of(kind, x, dim)
    assert_same_bits(y, expected)
    assert y.stride() == expected.stride()
    assert torch.equal(ledger, reference)
    if fused_from == 0:
        return
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, ledger = shortcut(kind, ours, dim)
    expected = apply_torch(call_of(kind, theirs))
    grad = torch.randn_like(y)
    assert_same_bits(
        *(torch.autograd.grad(out, z, grad)[0] for out, z in ((y, ours), (expected, theirs)))
    )
    assert torch.equal(ledger, reference)


@pytest.mark.parametrize("kind", IN_PLACE, ids=lambda kind: kind.name)
def test_in_place(kind: Kind) -> None:
    x = sample(4, 6)
    expected, reference = reference_of(kind, x.clone(), 1)
    version = x._version
    y, ledger = shortcut(kind, x, 1, inplace=True)
    assert y is x
    assert x._version > version
    assert_same_bits(x, expected)
    assert torch.equal(ledger, reference)


def test_in_place_in_inference_mode() -> None:
    with torch.inference_mode():
        x = sample(4, 6)
        expected = x.relu()
        y, _ = shortcut(KINDS["relu"], x, 1, inplace=True)
        assert y is x
        assert_same_bits(x, expected)


def test_a_changed_input_is_noticed_in_backward() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y, _ = shortcut(KINDS["relu"], x, 1)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(4, 6)[:, ::2], id="strided"),
        pytest.param(nn.Parameter(torch.randn(4, 3)), id="parameter"),
        pytest.param(torch.randn(4, 3).to_sparse(), id="sparse"),
        pytest.param(torch.ones(4, 3, dtype=torch.int32), id="integer"),
        pytest.param(torch.randn(4, 3, device="meta"), id="meta"),
        pytest.param(torch.randn(4, 5), id="other channels"),
    ],
)
def test_leaves_the_rest_to_the_op(x: Tensor) -> None:
    ledger = new_ledger(KINDS["relu"], 3)
    assert rectify_eager(KINDS["relu"], x, ledger, 3, 1, 0.0, False) is None
    assert ledger[POSITIONS] == 0


def test_leaves_modes_and_transforms_to_the_op() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    ledger, x, taken = new_ledger(KINDS["relu"], 3), torch.randn(4, 3), []

    def attempt(z: Tensor) -> Tensor:
        taken.append(rectify_eager(KINDS["relu"], z, ledger, 3, 1, 0.0, False))
        return z.sum()

    with FlopCounterMode(display=False):
        attempt(x)
    with FakeTensorMode():
        attempt(torch.empty(4, 3))
    torch.func.grad(attempt)(x)
    torch.autograd.functional.jvp(attempt, x, x)
    with torch.autograd.forward_ad.dual_level():
        attempt(x)
    torch.jit.trace(attempt, x, check_trace=False)
    # torch.autograd.functional.jvp runs in plain eager mode
    assert [y is None for y in taken] == [True, True, True, False, True, True]


def test_tracked_modules_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU())
    x = torch.randn(8, 4)
    expected = model(x)
    with layer_collapse.track(model) as tracker:
        monkeypatch.setattr(
            "layer_collapse.measure.taps.rectify",
            lambda *_: pytest.fail("the op was called in eager mode"),
        )
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
        assert all(row.positions == 16 for row in tracker.entropy().rows)
