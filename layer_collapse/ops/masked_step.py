"""Optimiser steps on the alive weights only: ``masked_sgd_``, ``masked_adamw_``, ``apply_masks_``.

Lists run in parallel: entry i of every list belongs to weight tensor i. Weight tensors are dense in
any order of dimensions (channels_last included), float32, float64, bfloat16 or float16; state has
the layout and dtype of its weights; gradients may have any strides; of DTensors the local parts are
stepped. ``masks[i]`` is
``[ceil(n / 32)]`` int32, bit ``j % 32`` of word ``j / 32`` set while the weight of *logical* index
j (C order of the shape, whatever the strides) is alive; an empty mask means that all are alive.

The steps rely on pruned weights and their state being zero already (``apply_masks_`` sees to it):
a word without an alive weight is skipped. Every ``*_reference`` is the same function in plain
PyTorch: oracle of the tests and baseline of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layer_collapse import _C  # noqa: F401 - registers torch.ops.layer_collapse
from layer_collapse.ops.mutation import bump_versions
from layer_collapse.sharding import local

__all__ = [
    "apply_masks_",
    "apply_masks_reference",
    "masked_adamw_",
    "masked_adamw_reference",
    "masked_sgd_",
    "masked_sgd_reference",
    "unpack_reference",
]


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of ``torch.optim.SGD`` in place; pruned weights and their momentum become 0.

    Args:
        params: weights, written.
        grads: gradients, shape and dtype of their weights.
        momentum_buffers: written; must be empty iff ``momentum`` is 0.
        masks: ``[ceil(n / 32)]`` int32 each, or empty.
        lr: a number, or one float in a tensor on the weights' device, which a graph reads anew.
        first_step: the buffers are set to the gradient, whatever they held.
        grad_scale: one float; gradients are divided by it (and stay as they are).
        found_inf: one float; anything but 0 leaves all tensors unchanged.

    Raises:
        RuntimeError: lists of unequal length, or a tensor of wrong shape, layout or dtype; nothing
            has changed then.
    """
    if not params:
        return
    rate, scale = _rate(lr)
    torch.ops.layer_collapse.masked_sgd_(
        _parts(params),
        _parts(grads),
        _parts(momentum_buffers),
        masks,
        rate,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first_step,
        grad_scale,
        found_inf,
        scale,
    )
    bump_versions(params, momentum_buffers)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of ``torch.optim.AdamW`` in place; pruned weights and their averages become 0.

    Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101); AMSGrad (Reddi et al., arXiv
    1904.09237) iff ``max_exp_avg_sqs`` is not empty.

    Args:
        params: weights, written.
        grads: gradients, shape and dtype of their weights.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: state, written.
        masks: ``[ceil(n / 32)]`` int32 each, or empty.
        lr: a number, or one float in a tensor on the weights' device, which a graph reads anew.
        steps: one float32 or float64 number each: which step this is, from 1; not written.
        grad_scale: one float; gradients are divided by it (and stay as they are).
        found_inf: one float; anything but 0 leaves all tensors unchanged.

    Raises:
        RuntimeError: lists of unequal length, a tensor of wrong shape, layout or dtype, or a step
            below 1; nothing has changed then.
    """
    if not params:
        return
    rate, scale = _rate(lr)
    torch.ops.layer_collapse.masked_adamw_(
        _parts(params),
        _parts(grads),
        _parts(exp_avgs),
        _parts(exp_avg_sqs),
        _parts(max_exp_avg_sqs),
        masks,
        steps,
        rate,
        beta1,
        beta2,
        eps,
        weight_decay,
        maximize,
        grad_scale,
        found_inf,
        scale,
    )
    bump_versions(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Writes 0.0 into every element whose mask bit is 0, whatever stood there (NaN too).

    Raises:
        RuntimeError: lists of unequal length, or a tensor of wrong dtype, layout or mask size;
            nothing has changed then.
    """
    if not tensors:
        return
    torch.ops.layer_collapse.apply_masks_(_parts(tensors), masks)
    bump_versions(tensors)


def _rate(lr: float | Tensor) -> tuple[float, Tensor | None]:
    """The op's ``lr`` and ``lr_scale``; their product is the rate."""
    return (1.0, lr) if isinstance(lr, Tensor) else (lr, None)


def _parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the ops see of tensors that may be spread over processes."""
    return [local(tensor) for tensor in tensors]


@torch.library.register_fake("layer_collapse::masked_sgd_")
@torch.library.register_fake("layer_collapse::masked_adamw_")
@torch.library.register_fake("layer_collapse::apply_masks_")
def _writes_in_place(*arguments: object) -> None:
    return None


def unpack_reference(words: Tensor, shape: Sequence[int]) -> Tensor:
    """``[ceil(n / 32)]`` int32 -> bool of ``shape``; all True for empty ``words``."""
    count = torch.Size(shape).numel()
    if words.numel() == 0:
        return torch.ones(shape, dtype=torch.bool, device=words.device)
    bits = (words.unsqueeze(1) >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    return bits.flatten()[:count].reshape(tuple(shape)).bool()


def _wide(tensor: Tensor) -> Tensor:
    """Halves are computed in float32, as the kernels do."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _slope(grad: Tensor, maximize: bool, grad_scale: Tensor | None) -> Tensor:
    slope = _wide(grad) if grad_scale is None else _wide(grad) / grad_scale.to(_wide(grad).dtype)
    return -slope if maximize else slope


def _store_alive(target: Tensor, value: Tensor, alive: Tensor) -> None:
    target.copy_(torch.where(alive, value, torch.zeros_like(value)))


@torch.no_grad()
def masked_sgd_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``masked_sgd_`` in plain PyTorch."""
    if found_inf is not None and found_inf.item() != 0:
        return
    lr = float(lr)
    for i, param in enumerate(params):
        alive = unpack_reference(masks[i], param.shape)
        weight, slope = _wide(param), _slope(grads[i], maximize, grad_scale)
        if weight_decay != 0:
            slope = slope + weight_decay * weight
        if momentum != 0:
            velocity = slope
            if not first_step:
                velocity = momentum * _wide(momentum_buffers[i]) + (1 - dampening) * slope
            slope = slope + momentum * velocity if nesterov else velocity
            _store_alive(momentum_buffers[i], velocity, alive)
        _store_alive(param, weight - lr * slope, alive)


@torch.no_grad()
def masked_adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``masked_adamw_`` in plain PyTorch."""
    if found_inf is not None and found_inf.item() != 0:
        return
    lr = float(lr)
    for i, param in enumerate(params):
        step = steps[i].item()
        alive = unpack_reference(masks[i], param.shape)
        weight, slope = _wide(param), _slope(grads[i], maximize, grad_scale)
        if weight_decay != 0:
            weight = weight * (1 - lr * weight_decay)
        mean = torch.lerp(_wide(exp_avgs[i]), slope, 1 - beta1)
        spread = _wide(exp_avg_sqs[i]) * beta2 + (1 - beta2) * slope * slope
        _store_alive(exp_avgs[i], mean, alive)
        _store_alive(exp_avg_sqs[i], spread, alive)
        if max_exp_avg_sqs:
            spread = torch.maximum(_wide(max_exp_avg_sqs[i]), spread)
            _store_alive(max_exp_avg_sqs[i], spread, alive)
        divisor = spread.sqrt() / (1 - beta2**step) ** 0.5 + eps
        _store_alive(param, weight - lr / (1 - beta1**step) * mean / divisor, alive)


@torch.no_grad()
def apply_masks_reference(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """``apply_masks_`` in plain PyTorch."""
    for tensor, words in zip(tensors, masks, strict=True):
        tensor.masked_fill_(~unpack_reference(words, tensor.shape), 0)
