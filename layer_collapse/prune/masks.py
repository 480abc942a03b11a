"""Which weights are alive: one bit per weight, kept outside the modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from layer_collapse import _C
from layer_collapse.ops.magnitude import magnitude_prune_, magnitude_shares
from layer_collapse.ops.masked_step import apply_masks_
from layer_collapse.prune.equal_masks import check_equal_masks
from layer_collapse.prune.mask_words import check_parameters, check_words, full_words
from layer_collapse.prune.shard_select import prune_spread_, spread_shares
from layer_collapse.ranks import Group
from layer_collapse.sharding import (
    count_over_shards,
    is_sharded,
    like_shards,
    local,
    local_part,
)

__all__ = ["Masks"]


class Masks:
    """One bit per weight for a set of named parameters; parameters and modules stay as they are.

    Nothing is renamed, wrapped or hooked: ``state_dict`` keys, ``deepcopy``, DDP and export see an
    ordinary model whose pruned weights are 0.0. Bits count weights in C order of the logical shape,
    so they hold for any memory format, and they follow their parameters to another device.

    Every change of the bits also zeroes the weights; the masked optimisers notice that by the
    weights' version counters and clear the state of the newly pruned before their next step.

    Of a parameter that is spread over processes (a DTensor, as FSDP2 and tensor parallel make them)
    each process holds the bits of its own part. Numbers and choices are then those of the whole
    tensor, equal on all processes, and what says so must be called on all of them.

    Args:
        named_parameters: name to parameter, e.g. ``dict(model.named_parameters())`` or some of
            them; float32, float64, bfloat16 or float16. All weights start alive.

    Raises:
        ValueError: no parameters, or one parameter under two names.
        TypeError: something that is no parameter, or of another dtype.
    """

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

    def shares(self, k: int, names: Sequence[str] | None = None) -> dict[str, int]:
        """How many of the k smallest alive weights over ``names`` (default: all) lie in each.

        Global magnitude pruning is ``masks.prune_(masks.shares(k))``: exactly k weights go, by
        (abs(w), order of the names, index).

        Raises:
            KeyError: an unknown name.
            ValueError: k is not between 0 and the alive weights, a name twice, or an alive NaN.
        """
        chosen = self.names if names is None else tuple(names)
        weights = [self._parameter(name) for name in chosen]
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"Masks.shares: names must differ (got {', '.join(chosen)})")
        alive = sum(self._alive(chosen))
        if not 0 <= k <= alive:
            raise ValueError(
                f"Masks.shares: k must lie between 0 and the {alive} alive weights (got {k})"
            )
        if k == 0:
            return dict.fromkeys(chosen, 0)
        if any(map(is_sharded, weights)):
            self._refuse_nan("Masks.shares", chosen)
            counts = spread_shares(weights, [self.words(name) for name in chosen], k)
            return dict(zip(chosen, counts.tolist(), strict=True))
        try:
            counts = magnitude_shares(weights, [self.words(name) for name in chosen], k)
        except RuntimeError:
            self._refuse_nan("Masks.shares", chosen)
            raise
        return dict(zip(chosen, counts.tolist(), strict=True))

    @torch.no_grad()
    def prune_(self, counts: Mapping[str, int]) -> None:
        """Prunes exactly ``counts[name]`` alive weights per name, the smallest by (abs(w), index).

        Raises:
            KeyError: an unknown name.
            ValueError: a count that is not between 0 and the alive weights, or an alive NaN. No
                bit and no weight has changed then.
        """
        for (name, count), alive in zip(counts.items(), self._alive(tuple(counts)), strict=True):
            if not 0 <= count <= alive:
                raise ValueError(
                    f"Masks.prune_: the count of {name!r} must lie between 0 and its {alive} alive "
                    f"weights (got {count})"
                )
        names = [name for name, count in counts.items() if count > 0]
        weights = [self._parameters[name] for name in names]
        words = [self.words(name) for name in names]
        if any(map(is_sharded, weights)):
            self._refuse_nan("Masks.prune_", names)
            prune_spread_(weights, words, [counts[name] for name in names])
        else:
            try:
                magnitude_prune_(weights, words, [counts[name] for name in names])
            except RuntimeError:
                self._refuse_nan("Masks.prune_", names)
                raise
        self._changed(names)

    @torch.no_grad()
    def prune_where_(self, name: str, pruned: Tensor) -> None:
        """Prunes the weights of ``name`` where ``pruned`` (bool, the parameter's shape) is True.

        ``pruned`` may be spread over processes or whole.

        Weights that are pruned already stay so.

        Raises:
            KeyError: an unknown name.
            ValueError: another shape or dtype.
        """
        parameter = self._parameter(name)
        if pruned.dtype != torch.bool or pruned.shape != parameter.shape:
            raise ValueError(
                f"Masks.prune_where_: the mask of {name!r} must be bool of shape "
                f"{list(parameter.shape)} (got {pruned.dtype} of {list(pruned.shape)})"
            )
        self.words(name).bitwise_and_(_packed(~local_part(pruned, parameter)))
        self._changed([name])

    @torch.no_grad()
    def apply_(self) -> None:
        """Writes 0.0 into every pruned weight."""
        self._apply(self.names)

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

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Copies: ``{"words": {name: int32 words on the CPU}, "shapes": {name: sizes}}``.

        In the place of the words of a DTensor stands :meth:`bool_mask`, a byte per weight, which
        torch.distributed.checkpoint can save and load on another number of processes.
        """
        return {
            "words": {name: self.saved(name) for name in self.names},
            "shapes": {name: list(p.shape) for name, p in self._parameters.items()},
        }

    def saved(self, name: str) -> Tensor:
        """What stands for the mask of ``name`` in a checkpoint: a copy of its words, on the CPU.

        Of a DTensor it is :meth:`bool_mask`.
        """
        if is_sharded(self._parameter(name)):
            return self.bool_mask(name)
        return self.words(name).detach().cpu().clone()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over the bits of ``state_dict()`` and zeroes what is pruned.

        Raises:
            ValueError: other names, shapes or sizes, words that are not int32, or bits beyond the
                last weight. Nothing has changed then.
        """
        if set(state) != {"words", "shapes"}:
            raise ValueError(
                "Masks.load_state_dict: keys must be 'words' and 'shapes' (got "
                f"{', '.join(map(repr, state)) or 'none'})"
            )
        for part in ("words", "shapes"):
            if wrong := set(state[part]) ^ set(self.names):
                raise ValueError(
                    f"Masks.load_state_dict: {part} must name the same parameters "
                    f"(got a difference in {', '.join(sorted(wrong))})"
                )
        for name, parameter in self._parameters.items():
            if list(state["shapes"][name]) != list(parameter.shape):
                raise ValueError(
                    f"Masks.load_state_dict: {name!r} must have shape {list(parameter.shape)} "
                    f"(got {list(state['shapes'][name])})"
                )
        self.load_words(state["words"])

    @torch.no_grad()
    def load_words(self, words: Mapping[str, Tensor]) -> None:
        """Takes over the bits of some parameters, in place, and zeroes what is pruned.

        Args:
            words: per name int32 words, or a bool tensor of the parameter's shape (True = alive),
                spread over processes or whole.

        Raises:
            KeyError: an unknown name.
            ValueError: another size or dtype, or bits beyond the last weight. Nothing has changed
                then.
        """
        packed = {
            name: self.as_words(f"Masks: the words of {name!r}", name, new)
            for name, new in words.items()
        }
        for name, new in packed.items():
            self.words(name).copy_(new)
        self._changed(list(words))

    def as_words(self, what: str, name: str, mask: Tensor) -> Tensor:
        """The words of the local part from words or bools; see :meth:`load_words`.

        Raises:
            ValueError: it is no mask of ``name``; the message begins with ``what``.
        """
        parameter = self._parameter(name)
        if mask.dtype == torch.bool and mask.shape == parameter.shape:
            return _packed(local_part(mask, parameter))
        check_words(what, mask, local(parameter).numel())
        return mask

    def clone(self) -> Masks:
        """Masks of the same parameters whose bits are independent of these."""
        copy = Masks(self._parameters)
        copy._words = {name: self.words(name).clone() for name in self.names}
        return copy

    def rebind(self, named_parameters: Mapping[str, Parameter]) -> None:
        """Moves the bits to the parameters of another model, e.g. a deep copy, and applies them.

        Also to this model's own after ``fully_shard``: each process then keeps its part of them.

        Raises:
            ValueError: names or shapes differ (further names are ignored); nothing has changed.
        """
        if missing := [name for name in self.names if name not in named_parameters]:
            raise ValueError(
                f"Masks.rebind: the model must have the masked parameters (got no {missing[0]!r})"
            )
        new = check_parameters(
            "Masks.rebind", {name: named_parameters[name] for name in self.names}
        )
        for name, parameter in new.items():
            if parameter.shape != self._parameters[name].shape:
                raise ValueError(
                    f"Masks.rebind: {name!r} must have shape {list(self._parameters[name].shape)} "
                    f"(got {list(parameter.shape)})"
                )
        for name, parameter in new.items():
            if is_sharded(parameter) or is_sharded(self._parameters[name]):
                self._words[name] = _packed(local_part(self.bool_mask(name), parameter))
        self._parameters = new
        self._names = {parameter: name for name, parameter in new.items()}
        self._changed(self.names)

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of this very tensor (by identity), or None if it has no mask."""
        return self._names.get(parameter)

    def __repr__(self) -> str:
        return f"Masks({len(self._parameters)} parameters, {self.sparsity():.2%} pruned)"

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


def _packed(bools: Tensor) -> Tensor:
    """``[ceil(n / 32)]`` int32 words of n bools, on their device."""
    return torch.from_numpy(_C.pack_mask(bools.flatten().cpu().numpy())).to(bools.device)
