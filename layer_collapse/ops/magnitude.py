"""Exact magnitude selection among alive weights: ``magnitude_shares`` and ``magnitude_prune_``;
``magnitude_histogram`` for selection over the weights of several processes.

Weights are ordered by (abs(w), tensor, index) as a stable sort would: ties go to the earlier
tensor, then to the smaller logical index (C order of the shape, whatever the strides). -0.0 equals
0.0, infinities come last, NaN among alive weights is refused. Nothing is sorted, copied or
concatenated, and no size is too large. Masks are those of ``layer_collapse.ops.masked_step``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layer_collapse import _C  # noqa: F401 - registers torch.ops.layer_collapse
from layer_collapse.ops.masked_step import unpack_reference
from layer_collapse.ops.mutation import bump_versions

__all__ = [
    "BUCKETS",
    "DIGIT_BITS",
    "choose_digit",
    "digits",
    "key_bits",
    "magnitude_histogram",
    "magnitude_histogram_reference",
    "magnitude_prune_",
    "magnitude_prune_reference",
    "magnitude_shares",
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
    """
    if not weights:
        raise RuntimeError("magnitude_shares: weights must hold at least one tensor (got none)")
    shares: Tensor = torch.ops.layer_collapse.magnitude_shares(weights, masks, k)
    return shares


def magnitude_prune_(
    weights: Sequence[Tensor], masks: Sequence[Tensor], counts: Sequence[int]
) -> None:
    """Clears the mask bits of the ``counts[i]`` smallest alive weights of every tensor i.

    The weights keep their values: ``apply_masks_`` zeroes them.

    Args:
        weights: float32, float64, bfloat16 or float16, any strides; not written.
        masks: ``[ceil(n / 32)]`` int32 each, written; empty ones have no bits to clear.
        counts: from 0 (leaves that tensor alone, NaN or not) to the alive weights of the tensor.

    Raises:
        RuntimeError: a count out of range, NaN in an alive weight, an empty mask, or a tensor of
            wrong dtype or size; no mask has changed then.
    """
    if not weights:
        return
    torch.ops.layer_collapse.magnitude_prune_(weights, masks, counts)
    bump_versions(masks)


def magnitude_histogram(
    weights: Sequence[Tensor], masks: Sequence[Tensor], prefix: Tensor, digit: int, wide: bool
) -> Tensor:
    """Alive weights of every tensor by one digit of abs(w), for a radix selection.

    The bits of abs(w), 31 of float32 or, if ``wide``, 63 of float64, order numbers as unsigned
    integers do. They are read in digits of 11 bits from the top, the last one having fewer. Counted
    are the weights whose digits before this one are ``prefix``. Histograms of several processes add
    up (all-reduce) to that of all their weights, from which :func:`choose_digit` takes the next
    digit of the k-th smallest, without waiting for the device::

        prefix, left = torch.zeros(1, dtype=torch.int64), torch.tensor([k])
        for digit in range(6 if wide else 3):
            histogram = magnitude_histogram(weights, masks, prefix, digit, wide).sum(0)
            torch.distributed.all_reduce(histogram)
            prefix, left = choose_digit(histogram, prefix, left, digit, wide)

    ``prefix`` ends as the bits of the k-th smallest abs(w), and ``left`` as how many weights that
    are equal to it belong to the k smallest. The first histogram tells whether there are k weights
    and whether any is NaN; both are for the caller to refuse.

    Args:
        weights, masks: as for :func:`magnitude_shares`.
        prefix: ``[1]`` int64 on the device of the weights.
        digit: from 0 to 2, if ``wide`` to 5.
        wide: must be true if any process has a float64 tensor.

    Returns:
        ``[len(weights), 2049]`` int64: 2048 buckets, then how many of the counted weights are NaN.

    Raises:
        RuntimeError: a digit out of range, float64 without ``wide``, or a tensor of wrong dtype or
            size.
    """
    if not weights:
        raise RuntimeError("magnitude_histogram: weights must hold at least one tensor (got none)")
    histogram: Tensor = torch.ops.layer_collapse.magnitude_histogram(
        weights, masks, prefix, digit, wide
    )
    return histogram


def choose_digit(
    histogram: Tensor, prefix: Tensor, left: Tensor, digit: int, wide: bool
) -> tuple[Tensor, Tensor]:
    """The prefix with the digit of the ``left``-th smallest, and its rank in that bucket.

    Args:
        histogram: ``[2049]`` int64, of all weights that are selected from.
        prefix, left: ``[1]`` int64.
    """
    upto = histogram[:BUCKETS].cumsum(0)
    bucket = (upto < left).sum(0, keepdim=True).clamp_(max=BUCKETS - 1)
    before = upto[bucket] - histogram[bucket]
    return (prefix << _digit_bits(digit, wide)) | bucket, left - before


#: Of the histogram of one digit of a magnitude.
DIGIT_BITS = 11
BUCKETS = 1 << DIGIT_BITS


def key_bits(wide: bool) -> int:
    """Bits of a magnitude: of float64, or of float32."""
    return 63 if wide else 31


def digits(wide: bool) -> int:
    """Digits of a magnitude."""
    return -(-key_bits(wide) // DIGIT_BITS)


def _digit_bits(digit: int, wide: bool) -> int:
    return min(DIGIT_BITS, key_bits(wide) - DIGIT_BITS * digit)


@torch.library.register_fake("layer_collapse::magnitude_histogram")
def _histogram_fake(
    weights: Sequence[Tensor], masks: Sequence[Tensor], prefix: Tensor, digit: int, wide: bool
) -> Tensor:
    return weights[0].new_empty((len(weights), BUCKETS + 1), dtype=torch.int64)


@torch.library.register_fake("layer_collapse::magnitude_shares")
def _shares_fake(weights: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> Tensor:
    return weights[0].new_empty((len(weights),), dtype=torch.int64)


@torch.library.register_fake("layer_collapse::magnitude_prune_")
def _prune_fake(weights: Sequence[Tensor], masks: Sequence[Tensor], counts: Sequence[int]) -> None:
    return None


def _magnitudes(weight: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """|w| as float64 and the alive flags, both [n] in C order."""
    alive = unpack_reference(words, weight.shape).flatten()
    return weight.detach().double().abs().flatten(), alive


@torch.no_grad()
def magnitude_histogram_reference(
    weights: Sequence[Tensor], masks: Sequence[Tensor], prefix: Tensor, digit: int, wide: bool
) -> Tensor:
    """``magnitude_histogram`` in plain PyTorch."""
    real, integer = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    low = key_bits(wide) - DIGIT_BITS * digit - _digit_bits(digit, wide)
    rows = []
    for weight, words in zip(weights, masks, strict=True):
        alive = unpack_reference(words, weight.shape)
        magnitudes = weight.detach()[alive].to(real).abs()
        digits = magnitudes.view(integer).to(torch.int64) >> low
        counted = digits >> _digit_bits(digit, wide) == prefix
        buckets = digits[counted] & ((1 << _digit_bits(digit, wide)) - 1)
        counts = torch.bincount(buckets, minlength=BUCKETS)
        rows.append(torch.cat([counts, magnitudes[counted].isnan().sum().view(1)]))
    return torch.stack(rows)


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
