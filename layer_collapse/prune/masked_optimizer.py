"""What the masked optimisers share: gradients, masks, mixed precision, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from layer_collapse.ops.eager import is_unobserved
from layer_collapse.ops.eager_step import StepPlan
from layer_collapse.ops.masked_step import apply_masks_
from layer_collapse.prune.masks import Masks
from layer_collapse.sharding import is_sharded, local

__all__ = ["MaskedOptimizer", "refuse_below"]

# What a parameter looked like when its pruned weights and state were last known to be zero and laid
# out alike: version of the masks, version counter and address of the weights.
_Stamp = tuple[int, int, int]


def refuse_below(optimizer: str, low: float, **values: Any) -> None:
    """Raises ValueError if a number (or one-element tensor) is not at least ``low``."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{optimizer}: {name} must be one number (got {value.numel()})")
        if not float(value) >= low:
            raise ValueError(f"{optimizer}: {name} must be at least {low:g} (got {float(value):g})")


class MaskedOptimizer(Optimizer):
    """Base of ``MaskedSGD`` and ``MaskedAdamW``; subclasses say what state is and how to step.

    The kernels skip words without an alive weight, so before a step every pruned weight and its
    state must be zero. That holds unless the masks, the weights or the state were touched from
    outside since the last step; each is noticed (``_Stamp``) and put right first.
    """

    # torch.amp.GradScaler then leaves unscaling and skipping to step(), see `grad_scale` below.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any], masks: Masks) -> None:
        self._masks = masks
        self._settled: dict[Tensor, tuple[_Stamp, Tensor]] = {}  # with the parameter's mask
        self._plans: dict[int, tuple[int, StepPlan]] = {}  # of groups, with the masks' version
        super().__init__(params, defaults)
        if all(masks.for_parameter(p) is None for g in self.param_groups for p in g["params"]):
            raise ValueError(
                f"{type(self).__name__}: masks must cover some of the parameters (got none of "
                "them; after copying a model, call Masks.rebind)"
            )

    @property
    def masks(self) -> Masks:
        """The masks that this optimiser keeps."""
        return self._masks

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, or a parameter that is not dense in memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if not self._step_again(index, group):
                self._step_anew(index, group)
        return loss

    def _step_again(self, index: int, group: dict[str, Any]) -> bool:
        """Steps a group that is as the last step left it; otherwise returns False, nothing done."""
        if torch.compiler.is_compiling():
            return False
        version, plan = self._plans.get(index, (0, None))
        scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if plan is None or scaler != (None, None) or not is_unobserved():
            return False
        grads = None
        if version == self._masks.version and plan.keys == self._state_keys(group):
            grads = plan.gradients(group["params"], self.state)
        if grads is None:
            del self._plans[index]
            return False
        self._step_memory(group, plan.tensors, [grad.data_ptr() for grad in grads])
        plan.stepped()
        return True

    @torch.no_grad()
    def _step_anew(self, index: int, group: dict[str, Any]) -> None:
        # GradScaler sets both attributes for the time of a step.
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        ready: dict[torch.device, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: gradients must be dense (got {parameter.grad.layout})"
                )
            ready.setdefault(parameter.device, []).append(parameter)
        for device, parameters in ready.items():
            masks = self._settle(parameters)
            self._step_group(
                group,
                parameters,
                masks,
                None if scale is None else scale.to(device),
                None if found_inf is None else found_inf.to(device),
            )
            if torch.compiler.is_compiling():
                continue
            for parameter, words in zip(parameters, masks, strict=True):
                self._settled[parameter] = self._stamp(parameter), words
            repeatable = scale is None and found_inf is None
            if repeatable and len(parameters) == len(group["params"]):
                states = [self.state.get(parameter, {}) for parameter in parameters]
                if StepPlan.covers(parameters, states):
                    plan = StepPlan(parameters, masks, states, self._state_keys(group))
                    self._plans[index] = self._masks.version, plan

    def state_dict(self) -> dict[str, Any]:
        """As torch's, plus ``["state"][i]["mask"]``: the int32 words of masked parameters.

        Of a DTensor it is a bool one that is spread alike, for torch.distributed.checkpoint.
        """
        packed = super().state_dict()
        for index, parameter in enumerate(self._all_parameters()):
            words = self._masks.for_parameter(parameter)
            if words is not None:
                state = packed["state"].get(index) or self._initial_state(parameter)
                if is_sharded(parameter):  # torch.distributed.checkpoint takes no loose words
                    words = self._masks.saved(self._masks.name_of(parameter) or "")
                packed["state"][index] = {**state, "mask": words}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over state and masks; a dict of the unmasked torch.optim class leaves the masks.

        Weights and state of pruned weights are zeroed at once.

        Raises:
            ValueError: groups of another size, or a mask that does not fit; nothing has changed.
        """
        # torch would cast the words to the parameter's dtype, so they take their own way.
        words: dict[str, Tensor] = {}
        saved = {**state_dict, "state": {}}
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = dict(zip(indices, self._all_parameters(), strict=False))
        for index, state in state_dict["state"].items():
            saved["state"][index] = {key: value for key, value in state.items() if key != "mask"}
            if "mask" in state and index in parameters:
                parameter = parameters[index]
                name = self._masks.name_of(parameter)
                if name is None:
                    raise ValueError(
                        f"{type(self).__name__}.load_state_dict: parameter {index} must have a "
                        "mask to load one (got a parameter outside Masks)"
                    )
                what = f"{type(self).__name__}.load_state_dict: the mask of {name!r}"
                words[name] = self._masks.as_words(what, name, state["mask"])
        super().load_state_dict(saved)
        self._masks.load_words(words)
        self._settled.clear()
        self._plans.clear()
        self._settle(self._all_parameters())

    def __getstate__(self) -> dict[str, Any]:  # deepcopy and pickle
        return {**super().__getstate__(), "_masks": self._masks, "_settled": {}, "_plans": {}}

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first step as far as it has any, for a checkpoint taken then."""
        raise NotImplementedError

    def _step_group(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        masks: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Steps parameters of one group and one device that have dense gradients."""
        raise NotImplementedError

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What a step writes beside the weights, as ``StepPlan`` takes it."""
        raise NotImplementedError

    def _step_memory(self, group: dict[str, Any], tensors: bytes, grads: list[int]) -> None:
        """Steps the tensors of a ``StepPlan``, given the addresses of their gradients."""
        raise NotImplementedError

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _words(self, parameter: Tensor) -> Tensor:
        """The parameter's mask; no words for a dense parameter."""
        words = self._masks.for_parameter(parameter)
        if words is None:
            return torch.empty(0, dtype=torch.int32, device=parameter.device)
        return words

    def _stamp(self, parameter: Tensor) -> _Stamp:
        part = local(parameter)  # a DTensor's own counter sees only what is done to the DTensor
        version = part._version if part is parameter else part._version + parameter._version
        return self._masks.version, version, part.data_ptr()

    def _settle(self, parameters: list[Tensor]) -> list[Tensor]:
        """Zeroes pruned weights and state that may not be zero, and lays state out as weights.

        Returns:
            The parameters' masks.
        """
        masks, stale, stale_masks = [], [], []
        for parameter in parameters:
            words = None
            if not torch.compiler.is_compiling():  # a graph has no addresses: it always clears
                stamp, words = self._settled.get(parameter, (None, None))
                words = words if stamp == self._stamp(parameter) else None
            if words is None:
                words = self._words(parameter)
                state = self.state.get(parameter, {})
                for key, value in state.items():
                    if not _is_elementwise(key, value, parameter):
                        continue
                    # A model that went to channels_last, or a checkpoint of one that did not.
                    if value.stride() != parameter.stride():
                        state[key] = torch.empty_like(parameter).copy_(value)
                if words.numel() > 0:
                    owned = [v for key, v in state.items() if _is_elementwise(key, v, parameter)]
                    stale += [parameter, *owned]
                    stale_masks += [words] * (1 + len(owned))
            masks.append(words)
        apply_masks_(stale, stale_masks)
        return masks


def _is_elementwise(key: str, value: object, parameter: Tensor) -> bool:
    """Whether a state entry holds one number per weight (a scalar weight's "step" does not)."""
    return key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape
