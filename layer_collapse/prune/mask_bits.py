"""The bits of the masks: which weights are alive, here and over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from layer_collapse import _C
from layer_collapse.ops.masked_step import apply_masks_
from layer_collapse.prune.equal_masks import check_equal_masks
from layer_collapse.prune.mask_words import check_parameters, check_words, full_words, packed
from layer_collapse.ranks import Group
from layer_collapse.sharding import count_over_shards, is_sharded, like_shards, local, local_part

__all__ = ["MaskBits"]


class MaskBits:
    """What can be asked of :class:`~layer_collapse.prune.masks.Masks`, and how bits are kept."""

    def __init__(self, named_parameters: Mapping[str, Parameter]) -> None:
        self._parameters = check_parameters("Masks", named_parameters)
        self._names: dict[Tensor, str] = {p: name for name, p in self._parameters.items()}
        self._words = {
            name: full_words(local(parameter).numel(), parameter.device)
            for name, parameter in self._parameters.items()
        }
        self._version = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in the order given."""
        return tuple(self._parameters)

    @property
    def version(self) -> int:
        """A number that grows with every change of the bits."""
        return self._version

    @property
    def is_dense(self) -> bool:
        """Whether every weight is alive."""
        return self._alive(self.names) == [p.numel() for p in self._parameters.values()]

    def alive(self, name: str) -> int:
        """Number of weights of ``name`` that are alive."""
        return self._alive([name])[0]

    def sparsity(self, names: Iterable[str] | None = None) -> float:
        """Pruned share of the weights of ``names`` (default: all), in [0, 1]; 0.0 of no weights."""
        chosen = self.names if names is None else tuple(names)
        total = sum(self._parameter(name).numel() for name in chosen)
        return 1.0 - sum(self._alive(chosen)) / total if total else 0.0

    def bool_mask(self, name: str) -> Tensor:
        """A new bool tensor of the parameter's shape on its device, spread alike, True = alive."""
        parameter = self._parameter(name)
        return like_shards(self._local_bools(name), parameter)

    def words(self, name: str) -> Tensor:
        """The live ``[ceil(n / 32)]`` int32 words of the n weights that are here, on their device.

        Not to be written.
        """
        parameter = self._parameter(name)
        if self._words[name].device != parameter.device:
            self._words[name] = self._words[name].to(parameter.device)
        return self._words[name]

    def for_parameter(self, parameter: Tensor) -> Tensor | None:
        """The words of this very tensor (by identity), or None if it has no mask."""
        name = self.name_of(parameter)
        return None if name is None else self.words(name)

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of this very tensor (by identity), or None if it has no mask."""
        return self._names.get(parameter)

    def check_(self) -> None:
        """Raises RuntimeError, with name and number, if a pruned weight is not 0.0."""
        revived = self._count(
            self.names, lambda name, w: int(((w != 0) & ~self._local_bools(name)).sum())
        )
        for name, others in zip(self.names, revived, strict=True):
            if others:
                raise RuntimeError(
                    f"Masks.check_: pruned weights must be 0.0 (got {others} others in {name!r})"
                )

    def check_ranks(self, group: Group = None) -> None:
        """Raises RuntimeError on all processes if their masks differ; names process and tensor.

        Processes that hold the same part of a parameter must hold the same bits.

        Args:
            group: of the processes to compare; None is all of them.
        """
        check_equal_masks(self._parameters, self._words, group)

    def saved(self, name: str) -> Tensor:
        """What stands for the mask of ``name`` in a checkpoint: a copy of its words, on the CPU.

        Of a DTensor it is :meth:`bool_mask`.
        """
        if is_sharded(self._parameter(name)):
            return self.bool_mask(name)
        return self.words(name).detach().cpu().clone()

    def as_words(self, what: str, name: str, mask: Tensor) -> Tensor:
        """The words of the local part from words or bools; see :meth:`load_words`.

        Raises:
            ValueError: it is no mask of ``name``; the message begins with ``what``.
        """
        parameter = self._parameter(name)
        if mask.dtype == torch.bool and mask.shape == parameter.shape:
            return packed(local_part(mask, parameter))
        check_words(what, mask, local(parameter).numel())
        return mask

    @torch.no_grad()
    def apply_(self) -> None:
        """Writes 0.0 into every pruned weight."""
        self._apply(self.names)

    def _parameter(self, name: str) -> Parameter:
        if name not in self._parameters:
            raise KeyError(f"Masks: unknown parameter (got {name!r})")
        return self._parameters[name]

    def _local_bools(self, name: str) -> Tensor:
        part = local(self._parameter(name))
        flat = _C.unpack_mask(self.words(name).cpu().numpy(), part.numel())
        return torch.from_numpy(flat).view(part.shape).to(part.device)

    def _count(self, names: Sequence[str], count: Callable[[str, Tensor], int]) -> list[int]:
        """What ``count`` finds in the local part of each parameter, over all its parts."""
        tensors = [self._parameter(name) for name in names]
        found = [count(n, local(t).detach()) for n, t in zip(names, tensors, strict=True)]
        return count_over_shards(tensors, found)

    def _alive(self, names: Sequence[str]) -> list[int]:
        return self._count(names, lambda name, _: _C.count_alive(self.words(name).cpu().numpy()))

    def _refuse_nan(self, method: str, names: Sequence[str]) -> None:
        """Ops know a NaN's position in a list, people know the name."""
        found = self._count(names, lambda n, w: int((w.isnan() & self._local_bools(n)).any()))
        for name, has_nan in zip(names, found, strict=True):
            if has_nan:
                raise ValueError(f"{method}: alive weights must not be NaN (got NaN in {name!r})")

    def _changed(self, names: Sequence[str]) -> None:
        self._version += 1
        self._apply(names)

    def _apply(self, names: Sequence[str]) -> None:
        with torch.no_grad():
            weights = [self._parameters[name] for name in names]
            apply_masks_(weights, [self.words(name) for name in names])

    def __repr__(self) -> str:
        return f"Masks({len(self._parameters)} parameters, {self.sparsity():.2%} pruned)"
