"""What the processes of a group tell each other. Only numbers and hashes travel, never pickles."""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "agree", "gathered", "hash64", "rank_name"]

#: Processes that work together; None is all of them, or none, as the function says.
Group: TypeAlias = "dist.ProcessGroup | None"  # a torch without torch.distributed has no such class


def gathered(own: Tensor, group: Group) -> list[Tensor]:
    """The tensor that every process brings, of equal shape and dtype, by rank in the group."""
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return everyone


def agree(problem: Exception | None, device: torch.device, group: Group) -> None:
    """Raises on all processes what any of them met, so that none is left waiting.

    Args:
        problem: what went wrong here, or None. An OSError stays one; the rest are ValueErrors.
        device: of tensors that the group can exchange.
        group: of the processes; without any, this one alone.
    """
    if not dist.is_initialized():
        if problem is not None:
            raise problem
        return
    own = torch.zeros(1024, dtype=torch.uint8)
    if problem is not None:
        text = ("O" if isinstance(problem, OSError) else "V") + str(problem)
        # Cut between characters, or the other processes could not read it.
        data = text.encode()[: own.numel()].decode(errors="ignore").encode()
        own[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    for message in gathered(own.to(device), group):
        if text := bytes(message.tolist()).rstrip(b"\0").decode():
            raise (OSError if text[0] == "O" else ValueError)(text[1:]) from problem


def rank_name(rank: int, group: Group) -> str:
    """What to call a process of the group in a message: its rank among all processes."""
    return f"rank {rank if group is None else dist.get_global_rank(group, rank)}"


def hash64(data: bytes) -> int:
    """A signed 64-bit number."""
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
