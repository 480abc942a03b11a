"""Rectifiers that count the signs of their input on the way: op, autograd, plain-PyTorch twin.

Gradients are those of torch's own backward kernels, so they are bit-identical to an untracked
model's and can be differentiated again. An ``autograd.Function`` around the mutating op costs less
per call than ``torch.library.register_autograd`` on a functional one (which would have to return
the counts), and traces under ``torch.compile(fullgraph=True)`` just as well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C  # noqa: F401 - importing the module registers the ops
from ..measure.rectifiers import KINDS, Call, Kind

# Words of a ledger before its counts, as in csrc/core/rectifier.h.
HEADER = 6
FLAGS, POSITIONS = 0, 1
LIVE_WORDS = slice(2, 5)
#: Bits of the flags word: count; also reduce the counts to the live words after every forward.
COUNT, LIVE = 1, 2

_aten = torch.ops.aten
_functorch = torch._C._functorch
_ops = torch.ops.layer_collapse


def new_ledger(kind: Kind, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """An empty ledger that counts: [6 + rows * channels] int64, header before the counts."""
    ledger = torch.zeros(HEADER + kind.rows * channels, dtype=torch.int64, device=device)
    ledger[FLAGS] = COUNT
    return ledger


def counts_of(ledger: Tensor, kind: Kind) -> Tensor:
    """The counters of a ledger as a [rows, channels] int64 view (z > 0, z < 0, NaN, ...)."""
    return ledger[HEADER:].view(kind.rows, -1)


@torch.library.register_fake("layer_collapse::rectify")
def _(
    x: Tensor,
    ledger: Tensor,
    kind: int,
    channel_dim: int,
    slope: float,
    weight: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    if x.is_contiguous() and kind not in (KINDS["relu6"].code, KINDS["prelu"].code):
        return x.new_empty(x.shape)  # as torch: dims of size 1 lose the strides they had
    return torch.empty_like(x)


@torch.library.register_fake("layer_collapse::rectify_")
def _(
    x: Tensor,
    ledger: Tensor,
    kind: int,
    channel_dim: int,
    slope: float,
    weight: Tensor | None,
    valid: Tensor | None,
) -> None:
    return None


def _forward(call: Call, ledger: Tensor, channel_dim: int, valid: Tensor | None) -> Tensor:
    x = call.x
    arguments = (ledger, call.kind.code, channel_dim, call.slope, call.weight, valid)
    if call.inplace:
        _ops.rectify_(x, *arguments)
        return x
    return _ops.rectify(x, *arguments)


def _backward(kind: Kind, grad: Tensor, saved: Tensor, slope: float) -> Tensor:
    """Gradient of a rectifier by torch's own kernel; ``saved`` is x, or y for ReLU."""
    match kind.name:
        case "relu":
            return _aten.threshold_backward(grad, saved, 0)
        case "relu6":
            return _aten.hardtanh_backward(grad, saved, 0.0, 6.0)
        case "leaky_relu":
            return _aten.leaky_relu_backward(grad, saved, slope, False)
        case "gelu" | "gelu_tanh":
            approximate = "tanh" if kind.name == "gelu_tanh" else "none"
            return _aten.gelu_backward(grad, saved, approximate=approximate)
        case "silu" if torch.is_grad_enabled():  # the kernel has no derivative, as in torch
            sigmoid = saved.sigmoid()
            return grad * sigmoid * (1.0 + saved * (1.0 - sigmoid))
        case "silu":
            return _aten.silu_backward(grad, saved)
        case _:
            return _aten.hardswish_backward(grad, saved)


class _Rectify(torch.autograd.Function):
    """Every rectifier but PReLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ledger: Tensor,
        kind: str,
        channel_dim: int,
        slope: float,
        valid: Tensor | None,
    ) -> Tensor:
        rectifier = KINDS[kind]
        y = _ops.rectify(x, ledger, rectifier.code, channel_dim, slope, None, valid)
        # ReLU keeps its result, as torch does: it is needed downstream anyway.
        ctx.save_for_backward(y if kind == "relu" else x)
        ctx.kind, ctx.slope = kind, slope
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return _backward(KINDS[ctx.kind], grad, saved, ctx.slope), None, None, None, None, None


class _Prelu(torch.autograd.Function):
    """weight: [1, C, 1, ...] as torch's own op saves it, so that either may replay the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ledger: Tensor,
        channel_dim: int,
        valid: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _ops.rectify(x, ledger, KINDS["prelu"].code, channel_dim, 0.0, weight, valid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _aten._prelu_kernel_backward(grad, x, weight)
        return grad_x, grad_weight.sum_to_size(weight.shape), None, None, None


class _RectifyInPlace(torch.autograd.Function):
    """x becomes y. ``before``: a copy of x where the gradient cannot be told from y, else None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        before: Tensor | None,
        ledger: Tensor,
        kind: str,
        channel_dim: int,
        slope: float,
        valid: Tensor | None,
    ) -> Tensor:
        _ops.rectify_(x, ledger, KINDS[kind].code, channel_dim, slope, None, valid)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x if before is None else before)
        ctx.kind, ctx.slope = kind, slope
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        if ctx.kind == "leaky_relu":
            grad_x = _aten.leaky_relu_backward(grad, saved, ctx.slope, True)
        else:
            grad_x = _backward(KINDS[ctx.kind], grad, saved, ctx.slope)
        return grad_x, None, None, None, None, None, None


def _autocast(tensor: Tensor) -> Tensor:
    """x or weight of a PReLU in the dtype that autocast, if it is on, gives it."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def count_signs(call: Call, ledger: Tensor, channel_dim: int, valid: Tensor | None = None) -> None:
    """Add the signs of a call's input to a ledger and leave the activation to the caller."""
    # LeakyReLU has PReLU's counters and no slopes per channel
    kind = KINDS["leaky_relu"] if call.kind.name == "prelu" else call.kind
    if not _transformed():
        _ops.rectify(call.x.detach(), ledger, kind.code, channel_dim, 1.0, None, valid)
        return
    x = _below_transforms(call.x)
    with torch._C._DisableFuncTorch():
        _ops.rectify(x.detach(), ledger, kind.code, channel_dim, 1.0, None, valid)


def _transformed() -> bool:
    """Whether a function transform (torch.func.grad, jvp, vmap) is running, in eager mode."""
    if torch.compiler.is_compiling():  # dynamo cannot look at the stack
        return False
    return _functorch.peek_interpreter_stack() is not None


def _below_transforms(x: Tensor) -> Tensor:
    """The plain tensor inside the wrappers of torch.func.grad, vjp and jvp."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            raise RuntimeError(
                "rectify: a tracked rectifier cannot run under torch.func.vmap, which hides how "
                "many samples there are; take the tracker off (remove()) around vmap"
            )
        x = _functorch.get_unwrapped(x)
    return x


def rectify(call: Call, ledger: Tensor, channel_dim: int, valid: Tensor | None = None) -> Tensor:
    """Apply a rectifier and add the signs of its input to a ledger, in one pass.

    Args:
        call: the rectifier, its input x (float32, float64, bfloat16 or float16, any strides) and
            its arguments.
        ledger: :func:`new_ledger` of ``call.kind`` for ``x.shape[channel_dim]`` channels, on x's
            device. Written unless its flag is off or autograd is replaying a forward.
        channel_dim: the dim that the neurons lie on.
        valid: bool, x's shape without ``channel_dim``; False positions are not counted.

    Returns:
        What torch's own function returns, bit for bit, with the same strides; x itself, changed,
        for an in-place call.
    """
    # The op passes no tangent on and autograd.Function no function transform; torch's own do both.
    if forward_ad._current_level >= 0 or _transformed():
        count_signs(call, ledger, channel_dim, valid)
        return apply_torch(call)
    if call.weight is not None:
        weight = _autocast(call.weight)
        call = replace(call, x=_autocast(call.x), weight=weight)
        if weight.numel() > 1 and channel_dim % call.x.dim() != 1:
            # torch's PReLU has its slopes on dim 1, these neurons lie on another
            count_signs(call, ledger, channel_dim, valid)
            return apply_torch(call)
    kind, x = call.kind, call.x
    if not (torch.is_grad_enabled() and (x.requires_grad or call.weight is not None)):
        return _forward(call, ledger, channel_dim, valid)
    if call.inplace:
        before = None if kind.name in ("relu", "relu6", "leaky_relu") else x.clone()
        return _RectifyInPlace.apply(x, before, ledger, kind.name, channel_dim, call.slope, valid)
    if kind.name == "prelu":
        shape = [1] * x.dim()
        shape[min(1, x.dim() - 1)] = -1
        assert call.weight is not None
        return _Prelu.apply(x, call.weight.view(shape), ledger, channel_dim, valid)
    return _Rectify.apply(x, ledger, kind.name, channel_dim, call.slope, valid)


def rectify_reference(
    call: Call, ledger: Tensor, channel_dim: int, valid: Tensor | None = None
) -> Tensor:
    """The same in plain PyTorch: oracle of the tests and peer of the benchmarks."""
    x, kind = call.x.detach(), call.kind
    dims = [d for d in range(x.dim()) if d != channel_dim % x.dim()]
    keep = torch.ones_like(x, dtype=torch.bool)
    if valid is not None:
        keep = valid.unsqueeze(channel_dim % x.dim()).expand_as(x)
    rows = [x > 0, x < 0, x.isnan()]
    if kind.name == "relu6":
        rows.append(x > 6)
    if kind.name == "hardswish":
        rows.append((x > -3) & (x < 3))
    if ledger[FLAGS] & COUNT:
        positions = math.prod(x.shape[d] for d in dims)
        ledger[POSITIONS] += positions if valid is None else int(valid.sum())
        for row, counter in zip(rows, counts_of(ledger, kind), strict=True):
            counter += (row & keep).sum(dims) if dims else (row & keep).long()
    return apply_torch(call)


def apply_torch(call: Call) -> Tensor:
    """The rectifier alone, by torch's op.

    Not by its function: a tracker that is active further out would catch and count that.
    """
    name = call.kind.name
    if name == "prelu":
        return _aten.prelu(call.x, call.weight)
    if name in ("gelu", "gelu_tanh"):
        return _aten.gelu(call.x, approximate="tanh" if name == "gelu_tanh" else "none")
    op = getattr(_aten, f"{name}_" if call.inplace else name)
    return op(call.x, call.slope) if name == "leaky_relu" else op(call.x)
