"""The way past the dispatcher: a masked step over the tensors of the step before.

An op call takes about 0.5 us per tensor and what it checks in Python as much again, and several
times that when a network's training has emptied the caches since the last step: as much as the step
itself takes on a sparse network. So after a step through the op a ``StepPlan`` keeps the addresses.
As long as nothing but the gradients' values and addresses has changed, the next steps hand them
straight to the loops.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layer_collapse.ops.eager import CODES

__all__ = ["StepPlan"]

_STATES = 3  # per tensor, see PackedTensor in csrc/eager_step.cpp


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype in CODES
        and tensor.is_contiguous()
    )


class StepPlan:
    """Where the weights, state and masks of one parameter group lie.

    Attributes:
        keys: of the state that the step writes; a last one, ``"step"``, counts the steps.
        tensors: all of it as csrc/eager_step.cpp reads it.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        masks: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        keys: tuple[str, ...],
    ) -> None:
        packed = array("q")
        self._entries = []
        self._written = list(parameters)
        for parameter, words, state in zip(parameters, masks, states, strict=True):
            kept: list[tuple[str, Tensor, int]] = [
                (key, state[key], state[key].data_ptr()) for key in keys
            ]
            addresses = [address for key, _, address in kept if key != "step"]
            packed.extend([parameter.data_ptr(), words.data_ptr(), parameter.numel()])
            packed.append(CODES[parameter.dtype])
            packed.extend(addresses + [0] * (_STATES - len(addresses)))
            packed.append(state["step"].data_ptr() if "step" in keys else 0)
            facts = parameter, parameter.data_ptr(), parameter.numel(), parameter.dtype
            self._entries.append((*facts, words, kept))
            self._written += [tensor for _, tensor, _ in kept]
        self.keys = keys
        self.tensors = packed.tobytes()
        self._versions = [parameter._version for parameter in parameters]

    @staticmethod
    def covers(parameters: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these are tensors that a plan can be made of, after the op has accepted them."""
        return (
            bool(parameters)
            and all(map(_is_plain, parameters))
            and all(
                key != "step" or (_is_plain(value) and value.dtype == torch.float32)
                for state in states
                for key, value in state.items()
            )
        )

    def gradients(
        self, parameters: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Any]]
    ) -> list[Tensor] | None:
        """The gradients, or None where anything else than they differs from the step before."""
        if len(parameters) != len(self._entries):
            return None
        strided = torch.strided  # every look-up counts here
        grads = []
        for parameter, version, (known, address, numel, dtype, _, kept) in zip(
            parameters, self._versions, self._entries, strict=True
        ):
            grad = parameter.grad
            if (
                parameter is not known
                or parameter._version != version
                or parameter.data_ptr() != address
                or parameter.numel() != numel
                or not parameter.is_contiguous()
                or type(grad) is not Tensor
                or grad.layout is not strided
                or grad.dtype is not dtype
                or grad.numel() != numel
                or not grad.is_contiguous()
            ):
                return None
            if kept:  # else there may be no state to look at
                state = states[parameter]
                for key, tensor, place in kept:
                    if state.get(key) is not tensor or tensor.data_ptr() != place:
                        return None
            grads.append(grad)
        return grads

    def stepped(self) -> None:
        """Tells autograd, as the op's wrapper does, that the tensors were written."""
        torch.autograd.graph.increment_version(self._written)
        self._versions = [entry[0]._version for entry in self._entries]
