"""Whether processes that must hold the same masks do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ranks import Group, gathered, hash64, rank_name
from ..sharding import is_sharded

__all__ = ["check_equal_masks"]


def check_equal_masks(
    parameters: Mapping[str, Parameter],
    words: Mapping[str, Tensor],
    group: Group,
) -> None:
    """Raises RuntimeError on every process if two hold different masks for the same weights.

    Two small exchanges, whatever the size of the masks; only hashes travel.

    Args:
        parameters: by name, spread or not.
        words: of their local parts.
        group: of the processes to compare; None is all of them.
    """
    described = repr([(name, tuple(p.shape)) for name, p in parameters.items()])
    device = next(iter(parameters.values())).device
    models = gathered(torch.tensor(hash64(described.encode()), device=device), group)
    for rank, model in enumerate(models):
        if not torch.equal(model, models[0]):
            raise RuntimeError(
                f"masks: {rank_name(rank, group)} has other parameters than {rank_name(0, group)}; "
                "build the same model and the same Masks on every process"
            )
    hashes = [
        (hash64(_part(parameter)), hash64(words[name].cpu().numpy().tobytes()))
        for name, parameter in parameters.items()
    ]
    own = torch.tensor(hashes, device=device)
    tables = [table.tolist() for table in gathered(own, group)]
    for row, name in enumerate(parameters):
        first: dict[int, tuple[int, int]] = {}  # by part: the process seen first, and its mask
        for rank, table in enumerate(tables):
            part, mask = table[row]
            if first.setdefault(part, (rank, mask))[1] != mask:
                other = rank_name(first[part][0], group)
                raise RuntimeError(
                    f"masks: {rank_name(rank, group)} differs from {other} in {name!r}; prune by "
                    "numbers that are equal on all processes, as tracker.entropy(group=...) gives"
                )


def _part(parameter: Any) -> bytes:
    """Which part of the parameter is here."""
    if not is_sharded(parameter):
        return b""
    where = zip(parameter.device_mesh.get_coordinate(), parameter.placements, strict=True)
    return repr([at for at, placement in where if not placement.is_replicate()]).encode()
