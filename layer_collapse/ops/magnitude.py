"""Exact magnitude selection among alive weights: ``magnitude_shares`` and ``magnitude_prune_``.

Weights are ordered by (abs(w), tensor, index) as a stable sort would: ties go to the earlier
tensor, then to the smaller logical index (C order of the shape, whatever the strides). -0.0 equals
0.0, infinities come last, NaN among alive weights is refused. Nothing is sorted, copied or
concatenated, and no size is too large. Masks are those of ``layer_collapse.ops.masked_step``; where
weights are spread over processes see ``layer_collapse.ops.magnitude_digits``.

On CUDA nothing waits for the device but :func:`check_selection`, which reads what there is to
refuse. ``magnitude_shares`` and ``magnitude_prune_`` end with it; ``magnitude_shares_ex`` and
``magnitude_prune_ex_``, named as in torch.linalg, leave it to the caller, and a CUDA graph can hold
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from layer_collapse import _C  # noqa: F401 - registers torch.ops.layer_collapse
from layer_collapse.ops.masked_step import unpack_reference
from layer_collapse.ops.mutation import bump_versions

__all__ = [
    "check_selection",
    "magnitude_prune_",
    "magnitude_prune_ex_",
    "magnitude_prune_reference",
    "magnitude_shares",
    "magnitude_shares_ex",
    "magnitude_shares_reference",
]


def magnitude_shares(weights: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> Tensor:
    """How many of the k smallest alive weights over all tensors lie in each of them.

    Args:
        weights: at least one tensor; float32, float64, bfloat16 and float16 may be mixed (all are
            then compared exactly, in the widest type), any strides.
        masks: ``[ceil(n / 32)]`` int32 each; an empty mask counts all weights as alive.
        k: from 0 to the number of alive weights.

    Returns:
        ``[len(weights)]`` int64 that sums to k, on the device of the weights.

    Raises:
        RuntimeError: k out of range, NaN in an alive weight, or a tensor of wrong dtype or size.
            To know of the first two this waits for the device.
    """
    shares, info = magnitude_shares_ex(weights, masks, k)
    check_selection("magnitude_shares", info)
    return shares


def magnitude_shares_ex(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """:func:`magnitude_shares` that does not wait for the device.

    Returns:
        The shares, all 0 if there is anything to refuse, and ``[1, 3]`` int64 for
        ``check_selection("magnitude_shares", info)``; both on the device of the weights.

    Raises:
        RuntimeError: a tensor of wrong dtype or size.
    """
    if not weights:
        raise RuntimeError("magnitude_shares: weights must hold at least one tensor (got none)")
    shares, info = torch.ops.layer_collapse.magnitude_shares(weights, masks, k)
    return shares, info


def magnitude_prune_(
    weights: Sequence[Tensor], masks: Sequence[Tensor], counts: Sequence[int] | Tensor
) -> None:
    """Clears the mask bits of the ``counts[i]`` smallest alive weights of every tensor i.

    The weights keep their values: ``apply_masks_`` zeroes them.

    Args:
        weights: float32, float64, bfloat16 or float16, any strides; not written.
        masks: ``[ceil(n / 32)]`` int32 each, written; empty ones have no bits to clear.
        counts: from 0 (leaves that tensor alone, NaN or not) to the alive weights of the tensor;
            numbers, or ``[len(weights)]`` int64 on the device of the weights, as
            :func:`magnitude_shares` gives them (then no mask may be empty).

    Raises:
        RuntimeError: a count out of range, NaN in an alive weight, an empty mask, or a tensor of
            wrong dtype or size; no mask has changed then. To know of the first two this waits for
            the device.
    """
    if not weights:
        return
    check_selection("magnitude_prune_", magnitude_prune_ex_(weights, masks, counts))


def magnitude_prune_ex_(
    weights: Sequence[Tensor], masks: Sequence[Tensor], counts: Sequence[int] | Tensor
) -> Tensor:
    """:func:`magnitude_prune_` that does not wait for the device.

    With the shares of :func:`magnitude_shares_ex` as counts, a whole global pruning stays on it.

    Args:
        weights: at least one tensor.

    Returns:
        ``[len(weights), 3]`` int64 on the device of the weights, for
        ``check_selection("magnitude_prune_", info)``; no mask has changed if it refuses any.

    Raises:
        RuntimeError: no weights, an empty mask, or a tensor of wrong dtype or size.
    """
    if not weights:
        raise RuntimeError("magnitude_prune_: weights must hold at least one tensor (got none)")
    info: Tensor
    if isinstance(counts, Tensor):
        info = torch.ops.layer_collapse.magnitude_prune_.on_device(weights, masks, counts)
    else:
        info = torch.ops.layer_collapse.magnitude_prune_.default(weights, masks, counts)
    bump_versions(masks)
    return info


def check_selection(op: str, info: Tensor) -> None:
    """Raises what a selection has to refuse. Reads the device, so it waits for what runs on it.

    Args:
        op: who speaks, and of what: ``magnitude_shares`` of k, ``magnitude_prune_`` of counts.
        info: ``[groups, 3]`` int64, per number to select: that number, the alive weights that it is
            selected from (0 if the number is 0), the first tensor with an alive NaN or -1.

    Raises:
        RuntimeError: a number out of range, or NaN in an alive weight.
    """
    rows: list[list[int]] = info.tolist()
    for i, (wanted, alive, _) in enumerate(rows):
        if not 0 <= wanted <= alive:
            what = "k" if op == "magnitude_shares" else f"counts[{i}]"
            raise RuntimeError(
                f"{op}: {what} must lie between 0 and the {alive} alive weights (got {wanted})"
            )
    for _, _, nan in rows:
        if nan >= 0:
            raise RuntimeError(f"{op}: alive weights must not be NaN (got NaN in weights[{nan}])")


@torch.library.register_fake("layer_collapse::magnitude_shares")
def _shares_fake(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: int
) -> tuple[Tensor, Tensor]:
    integers = partial(weights[0].new_empty, dtype=torch.int64)
    return integers((len(weights),)), integers((1, 3))


@torch.library.register_fake("layer_collapse::magnitude_prune_")
@torch.library.register_fake("layer_collapse::magnitude_prune_.on_device")
def _prune_fake(
    weights: Sequence[Tensor], masks: Sequence[Tensor], counts: Sequence[int] | Tensor
) -> Tensor:
    return weights[0].new_empty((len(weights), 3), dtype=torch.int64)


def _magnitudes(weight: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """|w| as float64 and the alive flags, both [n] in C order."""
    alive = unpack_reference(words, weight.shape).flatten()
    return weight.detach().double().abs().flatten(), alive


@torch.no_grad()
def magnitude_shares_reference(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: int
) -> Tensor:
    """``magnitude_shares`` in plain PyTorch: concatenates and sorts."""
    alive_magnitudes, owners = [], []
    for i, (weight, words) in enumerate(zip(weights, masks, strict=True)):
        magnitudes, alive = _magnitudes(weight, words)
        alive_magnitudes.append(magnitudes[alive])
        owners.append(torch.full_like(alive_magnitudes[-1], i, dtype=torch.int64))
    order = torch.sort(torch.cat(alive_magnitudes), stable=True).indices[:k]
    return torch.bincount(torch.cat(owners)[order], minlength=len(weights))


@torch.no_grad()
def magnitude_prune_reference(
    weights: Sequence[Tensor], masks: Sequence[Tensor], counts: Sequence[int]
) -> None:
    """``magnitude_prune_`` in plain PyTorch: sorts each tensor."""
    for weight, words, count in zip(weights, masks, counts, strict=True):
        magnitudes, alive = _magnitudes(weight, words)
        places = alive.nonzero().flatten()
        pruned = places[torch.sort(magnitudes[places], stable=True).indices[:count]]
        cleared = torch.zeros(words.numel() * 32, dtype=torch.int64, device=words.device)
        cleared[pruned] = 1
        bits = cleared.view(-1, 32) << torch.arange(32, device=words.device)
        # The sum of a word's bits lies below 2^32; the cast to int32 keeps its bit pattern.
        words.bitwise_and_(~bits.sum(1).to(torch.int32))
