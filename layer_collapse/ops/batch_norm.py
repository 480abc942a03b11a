"""Batch normalisation and the rectifier behind it in one op that also counts signs.

The op runs on the CPU; elsewhere :func:`bn_rectify` is torch's batch norm followed by the fused
rectifier.

What is counted is what eager code would hand to the rectifier: z in the dtype of x. The gradient is
computed from x and the statistics; neither z nor the result is kept for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C  # noqa: F401 - importing the module registers the ops
from ..measure.rectifiers import KINDS, Call, Kind
from .rectify import apply_torch, rectify, rectify_reference

_ops = torch.ops.layer_collapse

#: The rectifiers that the op knows.
FUSED_KINDS = ("relu", "relu6", "leaky_relu", "hardswish")


class Norm(NamedTuple):
    """One call of a batch normalisation: the arguments of ``F.batch_norm`` after its input."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float


def _result_like(x: Tensor) -> Tensor:
    """Strides of the result: channels_last stays, all else becomes contiguous, as in torch."""
    if not x.is_contiguous():
        for form in (torch.channels_last, torch.channels_last_3d):
            if x.dim() == (4 if form is torch.channels_last else 5) and x.is_contiguous(
                memory_format=form
            ):
                return torch.empty_like(x)
    return x.new_empty(x.shape)


@torch.library.register_fake("layer_collapse::bn_rectify")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    ledger: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    kind: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, invstd = (x.new_empty((x.shape[1],), dtype=statistics) for _ in range(2))
    return _result_like(x), mean, invstd


@torch.library.register_fake("layer_collapse::bn_rectify_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    kind: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = (
        x.new_empty((x.shape[1],), dtype=mean.dtype if p is None else p.dtype)
        for p in (weight, bias)
    )
    return _result_like(x), grad_weight, grad_bias


def _slope_at(kind: Kind, z: Tensor, slope: float) -> Tensor:
    """Derivative of a rectifier, as torch's backward kernels have it at the bends."""
    one = torch.ones_like(z)
    match kind.name:
        case "relu":
            return one.masked_fill(z <= 0, 0.0)
        case "relu6":
            return one.masked_fill((z <= 0) | (z >= 6), 0.0)
        case "leaky_relu":
            return torch.where(z > 0, one, slope)
        case _:
            bent = torch.where(z >= 3, one, z / 3 + 0.5)
            return bent.masked_fill(z <= -3, 0.0)


def bn_rectify_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    kind: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op in plain PyTorch, which can be differentiated again."""
    rectifier = next(k for k in KINDS.values() if k.code == kind)
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = [d for d in range(x.dim()) if d != 1]
    wide = mean.dtype
    d = x.to(wide) - mean.view(shape)
    inverse = invstd
    if training:  # statistics as functions of x; mean and invstd are their values
        average = x.to(wide).mean(dims)
        d = x.to(wide) - average.view(shape)
        variance = d.square().mean(dims)
        eps = (invstd.detach() ** -2 - variance.detach()).clamp(min=0)
        inverse = (variance + eps).rsqrt()
    factor = inverse if weight is None else inverse * weight.to(wide)
    z = d * factor.view(shape)
    if bias is not None:
        z = z + bias.to(wide).view(shape)
    z = z.to(x.dtype).to(wide)
    g = grad.to(wide) * _slope_at(rectifier, z, slope)
    xhat = d * inverse.view(shape)
    grad_bias, grad_weight = g.sum(dims), (g * xhat).sum(dims)
    dx = g
    if training:
        n = x.numel() // x.shape[1]
        dx = g - grad_bias.view(shape) / n - xhat * grad_weight.view(shape) / n
    dx = dx * factor.view(shape)
    return (
        dx.to(x.dtype),
        grad_weight.to(wide if weight is None else weight.dtype),
        grad_bias.to(wide if bias is None else bias.dtype),
    )


class _NormRectify(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        ledger: Tensor,
        kind: Kind,
        slope: float,
    ) -> Tensor:
        y, mean, invstd = _forward(x, norm, ledger, kind, slope)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.rest = (norm.training, kind.code, slope)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()  # the op has no derivative
        backward = bn_rectify_backward_reference if twice else _ops.bn_rectify_backward
        dx, grad_weight, grad_bias = backward(grad, *ctx.saved_tensors, *ctx.rest)
        needs = ctx.needs_input_grad
        return (
            dx,
            grad_weight if needs[1] else None,
            grad_bias if needs[2] else None,
            None,
            None,
            None,
            None,
        )


def _forward(
    x: Tensor, norm: Norm, ledger: Tensor, kind: Kind, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.bn_rectify(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        ledger,
        norm.training,
        norm.momentum,
        norm.eps,
        kind.code,
        slope,
    )


def _normalise(x: Tensor, norm: Norm) -> Tensor:
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.training,
        norm.momentum,
        norm.eps,
    )


def bn_rectify(call: Call, norm: Norm, ledger: Tensor) -> Tensor:
    """Normalise, rectify and add the signs in between to a ledger, in one pass.

    Args:
        call: the rectifier, one of :data:`FUSED_KINDS`. Its ``x`` is what is normalised, [N, C, ..]
            with elements, float32, float64, bfloat16 or float16; it is not changed.
        norm: the batch normalisation. Weights and statistics: contiguous [C], of x's dtype or
            float32. In training the running statistics, if given, are updated as torch does.
        ledger: ``new_ledger`` of ``call.kind`` for C channels.

    Returns:
        ``rectifier(F.batch_norm(x, ...))`` with torch's strides. Errors against float64 are those
        of torch's own kernels or smaller; its bits may differ in the last place.

    Raises:
        RuntimeError: one value per channel in training, and whatever does not fit.
    """
    x, weight, bias = call.x, norm.weight, norm.bias
    if not x.is_cpu:
        return rectify(replace(call, x=_normalise(x, norm)), ledger, 1)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return _NormRectify.apply(x, weight, bias, norm, ledger, call.kind, call.slope)
    return _forward(x, norm, ledger, call.kind, call.slope)[0]


def bn_rectify_reference(call: Call, norm: Norm, ledger: Tensor) -> Tensor:
    """The same in plain PyTorch: oracle of the tests and peer of the benchmarks."""
    z = _normalise(call.x, norm)
    then = Call(call.kind, z, slope=call.slope)
    rectify_reference(Call(call.kind, z.detach(), slope=call.slope), ledger, 1)
    return apply_torch(then)
