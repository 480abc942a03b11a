"""The processes that save and load together: they go on together or stop with one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from ..ranks import Group, agree, gathered, hash64, rank_name
from .folder import names_of

__all__ = ["Processes"]

_T = TypeVar("_T")


class Processes:
    """Those of a group, seen from one of them; without torch.distributed, this one alone.

    Attributes:
        rank: of this process in the group.
        count: how many there are.
        group: None is all of them.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self._device = group, device
        self._alone = not dist.is_initialized()
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.count = 1 if self._alone else dist.get_world_size(group)

    def together(self, what: str, hint: str, action: Callable[[], _T], repair: str = "") -> _T:
        """What ``action`` returns; if it fails on any process, all raise the same sentence.

        Args:
            what: could not be done; the sentence begins with it.
            hint: what to do, if anything, at its end.
            repair: goes before that where the disk or the system is at fault.
        """
        problem: Exception | None = None
        try:
            result = action()
        except Exception as error:  # whatever it is: the others must not be left waiting
            at_fault = isinstance(error, OSError)
            cause = getattr(error, "strerror", None) or error
            if not isinstance(error, (OSError, ValueError)):
                cause = f"{type(error).__name__}: {str(error)[:300]}"
            parts = [" ".join(str(cause).split()), repair if at_fault else "", hint]
            text = f"{what}: " + "; ".join(part for part in parts if part)
            problem = OSError(text) if at_fault else ValueError(text)
            problem.__cause__ = error
        agree(problem, self._device, self.group)
        return result

    def check_equal(self, what: str, values: Mapping[str, str], hint: str) -> None:
        """Raises ValueError on all processes if one brings another value; only hashes travel."""
        if self._alone:
            return
        own = torch.tensor([hash64(value.encode(errors="replace")) for value in values.values()])
        tables = [table.tolist() for table in gathered(own.to(self._device), self.group)]
        for rank, table in enumerate(tables):
            for name, here, first in zip(values, table, tables[0], strict=True):
                if here != first:
                    others = (
                        f"{rank_name(rank, self.group)} differs from {rank_name(0, self.group)}"
                    )
                    raise ValueError(f"{what}: {others} in {name}; {hint}")

    def files(self, sums: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """By file what all processes have written; those without tensors have no file of them."""
        if self._alone:
            return {name: value for name, value in sums.items() if value[0]}
        own = torch.tensor(list(sums.values()), device=self._device)
        every = enumerate(gathered(own, self.group))
        named = ((names_of(rank), values.tolist()) for rank, values in every)
        pairs = (pair for names, values in named for pair in zip(names, values, strict=True))
        return {name: value for name, value in pairs if value[0]}
