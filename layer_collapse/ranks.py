"""What the processes of a group tell each other. Only numbers and hashes travel, never pickles."""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "gathered", "hash64", "rank_name"]

#: Processes that work together; None is all of them, or none, as the function says.
Group: TypeAlias = "dist.ProcessGroup | None"  # a torch without torch.distributed has no such class


def gathered(own: Tensor, group: Group) -> list[Tensor]:
    """The tensor that every process brings, of equal shape and dtype, by rank in the group."""
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return everyone


def rank_name(rank: int, group: Group) -> str:
    """What to call a process of the group in a message: its rank among all processes."""
    return f"rank {rank if group is None else dist.get_global_rank(group, rank)}"


def hash64(data: bytes) -> int:
    """A signed 64-bit number."""
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
