"""Which weights are alive: one bit per weight, kept outside the modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from layer_collapse.ops.magnitude import magnitude_prune_, magnitude_shares
from layer_collapse.prune.mask_bits import MaskBits
from layer_collapse.prune.mask_words import check_parameters, packed
from layer_collapse.prune.shard_select import prune_spread_, spread_shares
from layer_collapse.sharding import is_sharded, local_part

__all__ = ["Masks"]


class Masks(MaskBits):
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

    def shares(self, k: int, names: Sequence[str] | None = None) -> dict[str, int]:
        """How many of the k smallest alive weights over ``names`` (default: all) lie in each.

        Global magnitude pruning is ``masks.prune_(masks.shares(k))``: exactly k weights go, by
        (abs(w), order of the names, index). On CUDA both wait for the device, as they count alive
        weights; ``layer_collapse.ops.magnitude`` has what does not.

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
        self.words(name).bitwise_and_(packed(~local_part(pruned, parameter)))
        self._changed([name])

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Copies: ``{"words": {name: int32 words on the CPU}, "shapes": {name: sizes}}``.

        In the place of the words of a DTensor stands :meth:`bool_mask`, a byte per weight, which
        torch.distributed.checkpoint can save and load on another number of processes.
        """
        return {
            "words": {name: self.saved(name) for name in self.names},
            "shapes": {name: list(p.shape) for name, p in self._parameters.items()},
        }

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
        new_words = {
            name: self.as_words(f"Masks: the words of {name!r}", name, new)
            for name, new in words.items()
        }
        for name, new in new_words.items():
            self.words(name).copy_(new)
        self._changed(list(words))

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
                self._words[name] = packed(local_part(self.bool_mask(name), parameter))
        self._parameters = new
        self._names = {parameter: name for name, parameter in new.items()}
        self._changed(self.names)
