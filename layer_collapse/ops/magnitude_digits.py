"""Exact magnitude selection over the weights of several processes, a digit at a time.

The order of weights is that of ``layer_collapse.ops.magnitude``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layer_collapse import _C  # noqa: F401 - registers torch.ops.layer_collapse
from layer_collapse.ops.masked_step import unpack_reference

__all__ = [
    "BUCKETS",
    "DIGIT_BITS",
    "choose_digit",
    "digits",
    "key_bits",
    "magnitude_histogram",
    "magnitude_histogram_reference",
]

#: Of the histogram of one digit of a magnitude.
DIGIT_BITS = 11
BUCKETS = 1 << DIGIT_BITS


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
        weights, masks: as for ``magnitude_shares``.
        prefix: ``[1]`` int64 on the device of the weights.
        digit: from 0 to 2, if ``wide`` to 5.
        wide: must be true if any process has a float64 tensor.

    Returns:
        ``[len(weights), 2049]`` int64: 2048 buckets, then how many of the counted weights are NaN
        (each is also in a bucket, infinity's or a later one).

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
        # torch's conversion of a NaN depends on where in a vector it stands
        magnitudes[magnitudes.isnan()] = torch.nan
        digits = magnitudes.view(integer).to(torch.int64) >> low
        counted = digits >> _digit_bits(digit, wide) == prefix
        buckets = digits[counted] & ((1 << _digit_bits(digit, wide)) - 1)
        counts = torch.bincount(buckets, minlength=BUCKETS)
        rows.append(torch.cat([counts, magnitudes[counted].isnan().sum().view(1)]))
    return torch.stack(rows)
