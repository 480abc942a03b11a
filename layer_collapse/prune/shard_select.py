"""Exact magnitude selection where weights are spread over processes.

The k-th smallest magnitude is found by its bits from above, 11 at a time: every process counts the
digits of its own part, the counts are added up, and all processes take the same digit. What is then
left to say is which of the weights of exactly that magnitude go, and their indices in the whole
tensor are selected in the same way. So the choice is the one that a single process would make.

Costs, per tensor, 16 KB of all-reduce for each of 3 digits (6 for float64), whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.magnitude import magnitude_prune_
from ..ops.magnitude_digits import BUCKETS, DIGIT_BITS, key_bits, magnitude_histogram
from ..ops.masked_step import unpack_reference
from ..sharding import global_index, local, sum_over_shards

__all__ = ["prune_spread_", "spread_shares"]

#: ``count(i, prefix, digit)``: how many local keys of tensor i whose digits before this one are
#: ``prefix`` ([] int64) fall into each bucket, [2048] int64.
_Count = Callable[[int, Tensor, int], Tensor]


class _Cut(NamedTuple):
    """Where the k smallest keys of every row end; R rows, T tensors, all int64."""

    key: Tensor  # [R], the k-th smallest
    equal_taken: Tensor  # [R], how many keys that are equal to it belong to the k
    here: Tensor  # [T, 2], local keys below it and equal to it
    everywhere: Tensor  # [T, 2], the same over all processes


def _cut(tensors: Sequence[Tensor], count: _Count, rows: Tensor, ks: Tensor, bits: int) -> _Cut:
    """Finds the ``ks[r]``-th smallest key (from 1) among the tensors of each row r.

    Args:
        tensors: T tensors that say how their keys are spread.
        rows: [T] int64, the row that each tensor belongs to.
        ks: [R] int64, each between 1 and the number of keys of its row.
        bits: of a key; digits of 11 from the top, the last one may have fewer.
    """
    key, left = torch.zeros_like(ks), ks.clone()
    here = ks.new_zeros(len(tensors), 2)
    everywhere = here.clone()
    for digit, start in enumerate(range(0, bits, DIGIT_BITS)):
        counts = torch.stack([count(i, key[rows[i]], digit) for i in range(len(tensors))])
        totals = sum_over_shards(tensors, counts.clone())
        up_to = ks.new_zeros(len(ks), BUCKETS).index_add_(0, rows, totals).cumsum(1)
        bucket = (up_to < left[:, None]).sum(1, keepdim=True)
        left -= _below(up_to, bucket)
        for split, part in ((here, counts), (everywhere, totals)):
            own = bucket[rows]
            split[:, 0] += _below(part.cumsum(1), own)
            split[:, 1] = part.gather(1, own)[:, 0]
        key = key << min(DIGIT_BITS, bits - start) | bucket[:, 0]
    return _Cut(key, left, here, everywhere)


def _below(up_to: Tensor, bucket: Tensor) -> Tensor:
    """Of counts summed up along buckets, those before ``bucket`` ([R, 1]): [R]."""
    return torch.where(bucket > 0, up_to.gather(1, (bucket - 1).clamp(min=0)), 0)[:, 0]


def _cut_magnitudes(
    weights: Sequence[Tensor], masks: Sequence[Tensor], rows: Tensor, ks: Tensor
) -> _Cut:
    """:func:`_cut` of the alive magnitudes; their bits, read as integers, have the same order."""
    wide = any(weight.dtype == torch.float64 for weight in weights)
    parts = [local(weight).detach() for weight in weights]

    def count(i: int, prefix: Tensor, digit: int) -> Tensor:
        found = magnitude_histogram(parts[i : i + 1], masks[i : i + 1], prefix[None], digit, wide)
        return found[0, :BUCKETS]

    return _cut(weights, count, rows, ks, key_bits(wide))


@torch.no_grad()
def spread_shares(weights: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> Tensor:
    """``magnitude_shares`` over all processes, for 0 < k <= alive weights and none of them NaN."""
    one_row = torch.zeros(len(weights), dtype=torch.int64, device=weights[0].device)
    cut = _cut_magnitudes(weights, masks, one_row, one_row.new_tensor([k]))
    below, ties = cut.everywhere.unbind(1)
    earlier = ties.cumsum(0) - ties
    return below + torch.minimum((cut.equal_taken - earlier).clamp(min=0), ties)


@torch.no_grad()
def prune_spread_(
    weights: Sequence[Tensor], masks: Sequence[Tensor], counts: Sequence[int]
) -> None:
    """``magnitude_prune_`` over all processes, for counts from 1 and no NaN alive.

    Args:
        weights: spread or not; not written.
        masks: the words of the local parts, written.
        counts: of the whole tensors.
    """
    if not weights:
        return
    rows = torch.arange(len(weights), device=weights[0].device)
    cut = _cut_magnitudes(weights, masks, rows, rows.new_tensor(list(counts)))
    own = cut.here.sum(1)
    # Where some of the ties stay, the first ones in the whole tensor go.
    divided = (cut.equal_taken < cut.everywhere[:, 1]).nonzero().flatten()
    if len(divided):
        tensors = [weights[i] for i in divided.tolist()]
        wide = any(weight.dtype == torch.float64 for weight in weights)
        ties = [
            global_index(weights[i], _places(weights[i], masks[i], _magnitude(cut.key[i], wide)))
            for i in divided.tolist()
        ]
        first_ones = _cut_indices(tensors, ties, cut.equal_taken[divided])
        own[divided] = cut.here[divided, 0] + first_ones
    # A part keeps the order of the whole, so its own smallest are the right ones.
    magnitude_prune_([local(weight) for weight in weights], masks, own.tolist())


def _magnitude(key: Tensor, wide: bool) -> Tensor:
    """The magnitude whose bits these are."""
    return key.view(torch.float64) if wide else key.to(torch.int32).view(torch.float32)


def _places(weight: Tensor, words: Tensor, magnitude: Tensor) -> Tensor:
    """Local indices of the alive weights of this magnitude."""
    part = local(weight).detach()
    alive = unpack_reference(words, part.shape)
    return ((part.abs() == magnitude.to(part.dtype)) & alive).flatten().nonzero().flatten()


def _cut_indices(tensors: Sequence[Tensor], indices: Sequence[Tensor], ks: Tensor) -> Tensor:
    """Per tensor how many of its ``ks`` smallest indices over all processes are local: [T]."""
    bits = max(tensor.numel() for tensor in tensors).bit_length()

    def count(i: int, prefix: Tensor, digit: int) -> Tensor:
        after = max(0, bits - DIGIT_BITS * (digit + 1))
        width = bits - DIGIT_BITS * digit - after
        own = indices[i][indices[i] >> (after + width) == prefix]
        return torch.bincount((own >> after) & ((1 << width) - 1), minlength=BUCKETS)

    rows = torch.arange(len(tensors), device=ks.device)
    return _cut(tensors, count, rows, ks, bits).here.sum(1)
