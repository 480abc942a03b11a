"""Exact magnitude selection where weights are spread over processes.

The k-th smallest magnitude is found by its bits from above, 11 at a time: every process counts the
digits of its own part, the counts are added up, and all processes take the same digit. What is then
left to say is which of the weights of exactly that magnitude go, and their indices in the whole
tensor are selected in the same way. So the choice is the one that a single process would make.

Costs 4 bytes per alive weight of the local parts (8 for float64) while it runs, and per tensor
16 KB of all-reduce for each of 3 digits (6 for float64), whatever the size of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.magnitude import magnitude_prune_
from ..ops.masked_step import unpack_reference
from ..sharding import global_index, local, sum_over_shards

__all__ = ["prune_spread_", "spread_shares"]

_DIGIT = 11  # bits


def _magnitude_keys(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Per tensor the alive local magnitudes as integers of the same order, and their bits."""
    wide = any(weight.dtype == torch.float64 for weight in weights)
    number, key = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    keys = []
    for weight, words in zip(weights, masks, strict=True):
        part = local(weight).detach()
        alive = part.flatten()[unpack_reference(words, part.shape).flatten()]
        keys.append(alive.to(number).abs().view(key))
    return keys, 63 if wide else 31


def _kth_smallest(
    tensors: Sequence[Tensor], keys: Sequence[Tensor], rows: Tensor, ks: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """The ``ks[r]``-th smallest key (from 1) over all processes, among the tensors of each row r.

    Args:
        tensors: T tensors that say how keys are spread.
        keys: per tensor the local keys, non-negative integers below ``2 ** bits``.
        rows: [T] int64, the row that each tensor belongs to.
        ks: [R] int64, each between 1 and the number of keys of its row.

    Returns:
        The keys, [R] int64, and how many keys of exactly that value are among the k, [R] int64.
    """
    found, left = torch.zeros_like(ks), ks.clone()
    while bits > 0:
        digit = min(_DIGIT, bits)
        bits -= digit
        counts = ks.new_zeros(len(tensors), 1 << digit)
        for tensor, own in enumerate(keys):
            own = own[own >> (bits + digit) == found[rows[tensor]]]
            counts[tensor] = torch.bincount(
                (own >> bits) & ((1 << digit) - 1), minlength=1 << digit
            )
        counts = sum_over_shards(tensors, counts)
        up_to = ks.new_zeros(len(ks), 1 << digit).index_add_(0, rows, counts).cumsum(1)
        value = (up_to < left[:, None]).sum(1, keepdim=True)
        left -= torch.where(value > 0, up_to.gather(1, (value - 1).clamp(min=0)), 0)[:, 0]
        found = found << digit | value[:, 0]
    return found, left


def _split_at(
    tensors: Sequence[Tensor], keys: Sequence[Tensor], cut: Tensor
) -> tuple[Tensor, Tensor]:
    """[T, 2] int64: keys below the cut [T] and equal to it, in the local parts and over all."""
    pairs = [
        torch.stack([(own < at).sum(), (own == at).sum()])
        for own, at in zip(keys, cut, strict=True)
    ]
    here = torch.stack(pairs)
    return here, sum_over_shards(tensors, here.clone())


@torch.no_grad()
def spread_shares(weights: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> Tensor:
    """``magnitude_shares`` over all processes, for 0 < k <= alive weights and none of them NaN."""
    keys, bits = _magnitude_keys(weights, masks)
    rows = torch.zeros(len(weights), dtype=torch.int64, device=keys[0].device)
    cut, ties_taken = _kth_smallest(weights, keys, rows, rows.new_tensor([k]), bits)
    _, (below, ties) = (part.unbind(1) for part in _split_at(weights, keys, cut[rows]))
    earlier = ties.cumsum(0) - ties
    return below + torch.minimum((ties_taken - earlier).clamp(min=0), ties)


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
    keys, bits = _magnitude_keys(weights, masks)
    rows = torch.arange(len(weights), device=keys[0].device)
    cut, taken = _kth_smallest(weights, keys, rows, rows.new_tensor(list(counts)), bits)
    here, over_all = _split_at(weights, keys, cut)
    own = here.sum(1)
    # Where some of the ties stay, the first ones in the whole tensor go.
    divided = (taken < over_all[:, 1]).nonzero().flatten().tolist()
    if divided:
        tensors = [weights[i] for i in divided]
        ties = []
        for i in divided:
            part = local(weights[i]).detach()
            tied = part.abs().flatten() == _value_of(cut[i], bits).to(part.dtype)
            tied &= unpack_reference(masks[i], part.shape).flatten()
            ties.append(global_index(weights[i], tied.nonzero().flatten()))
        most = max(tensor.numel() for tensor in tensors)
        among = torch.arange(len(divided), device=rows.device)
        last, _ = _kth_smallest(tensors, ties, among, taken[divided], most.bit_length())
        first_ones = [(tie <= at).sum() for tie, at in zip(ties, last, strict=True)]
        own[divided] = here[divided, 0] + torch.stack(first_ones)
    # A part keeps the order of the whole, so its own smallest are the right ones.
    magnitude_prune_([local(weight) for weight in weights], masks, own.tolist())


def _value_of(key: Tensor, bits: int) -> Tensor:
    """The magnitude whose key this is."""
    return key.view(torch.float64) if bits == 63 else key.to(torch.int32).view(torch.float32)
