"""Counts of several processes together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.rectify import HEADER, POSITIONS
from ..ranks import Group, gathered, hash64, rank_name

__all__ = ["check_equal_weights", "summed_ledgers"]


def summed_ledgers(ledgers: Sequence[Tensor], group: Group) -> list[Tensor]:
    """New ledgers with the positions and counts of all processes, by one all-reduce.

    The ledgers stay as they are, so asking twice counts nothing twice. Every process brings ledgers
    of the same rectifiers.
    """
    device = ledgers[0].device
    counted = [torch.cat([own[POSITIONS, None], own[HEADER:]]).to(device) for own in ledgers]
    sums = torch.cat(counted)
    dist.all_reduce(sums, group=group)
    result = []
    for own, total in zip(ledgers, sums.split([len(part) for part in counted]), strict=True):
        whole = own.clone()
        whole[POSITIONS], whole[HEADER:] = total[0], total[1:]
        result.append(whole)
    return result


def check_equal_weights(fingerprint: str, device: torch.device, group: Group) -> None:
    """Raises RuntimeError on every process if one has another model; names the first that has."""
    own = torch.tensor([hash64(fingerprint.encode())], device=device)
    everyone = torch.cat(gathered(own, group)).tolist()
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise RuntimeError(
                f"the weights or buffers of {rank_name(rank, group)} differ from those of "
                f"{rank_name(0, group)}; a scan over several processes needs equal models"
            )
