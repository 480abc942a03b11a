"""``MaskedSGD`` and ``MaskedAdamW``, and ``keep_pruned`` for every other optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from layer_collapse import _C
from layer_collapse.ops.masked_step import apply_masks_, masked_adamw_, masked_sgd_
from layer_collapse.prune.masked_optimizer import MaskedOptimizer, refuse_below
from layer_collapse.prune.masks import Masks

__all__ = ["MaskedAdamW", "MaskedSGD", "keep_pruned"]


class MaskedSGD(MaskedOptimizer):
    """``torch.optim.SGD`` that keeps pruned weights and their momentum exactly 0.0.

    One fused pass over the alive weights. State keys and dtypes are torch's, so a ``state_dict``
    of either loads into the other; ours carries the masks as well.

    Args:
        params: parameters or groups, as for any optimiser; those without a mask are dense.
        lr: number, or one-element tensor, which a compiled step reads anew under a schedule.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        masks: covers some of the parameters.

    Raises:
        ValueError: a number out of range, or masks of other parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        masks: Masks,
    ) -> None:
        refuse_below("MaskedSGD", 0.0, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "MaskedSGD: nesterov needs a momentum and no dampening "
                f"(got momentum {momentum:g}, dampening {dampening:g})"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, masks)

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {}

    def _step_group(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        masks: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        momentum = float(group["momentum"])
        first = [
            momentum != 0 and self.state.get(p, {}).get("momentum_buffer") is None
            for p in parameters
        ]
        # The buffer's first value is the gradient, undampened; a step that GradScaler skips must
        # not use that up. Only the first step reads found_inf here.
        if any(first) and found_inf is not None and bool(found_inf != 0):
            return
        for first_step in sorted(set(first)):
            chosen = [i for i, is_first in enumerate(first) if is_first == first_step]
            some = [parameters[i] for i in chosen]
            if first_step:
                for parameter in some:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            masked_sgd_(
                some,
                [_grad(p) for p in some],
                [self.state[p]["momentum_buffer"] for p in some] if momentum != 0 else [],
                [masks[i] for i in chosen],
                lr=_rate(group["lr"], parameters[0].device),
                momentum=momentum,
                dampening=float(group["dampening"]),
                weight_decay=float(group["weight_decay"]),
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                first_step=first_step,
                grad_scale=grad_scale,
                found_inf=found_inf,
            )

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _step_memory(self, group: dict[str, Any], tensors: bytes, grads: list[int]) -> None:
        _C.masked_sgd_memory(
            tensors,
            grads,
            float(group["lr"]),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            group["nesterov"],
            group["maximize"],
        )


class MaskedAdamW(MaskedOptimizer):
    """``torch.optim.AdamW`` that keeps pruned weights and their averages exactly 0.0.

    Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), optionally AMSGrad (Reddi et
    al., arXiv 1904.09237), in one fused pass over the alive weights. State keys and dtypes are
    torch's, so a ``state_dict`` of either loads into the other; ours carries the masks as well.

    Args:
        params: parameters or groups, as for any optimiser; those without a mask are dense.
        lr: number, or one-element tensor, which a compiled step reads anew under a schedule.
        betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        masks: covers some of the parameters.

    Raises:
        ValueError: a number out of range, or masks of other parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        masks: Masks,
    ) -> None:
        refuse_below("MaskedAdamW", 0.0, lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"MaskedAdamW: betas must lie in [0, 1) (got {betas})")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults, masks)

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {
            # On the parameter's device, as torch's fused AdamW has it: no copy in a step.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _step_group(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        masks: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.state[parameter].update(self._initial_state(parameter))
        states = [self.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        try:
            masked_adamw_(
                parameters,
                [_grad(p) for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
                masks,
                steps,
                lr=_rate(group["lr"], parameters[0].device),
                beta1=float(group["betas"][0]),
                beta2=float(group["betas"][1]),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                maximize=group["maximize"],
                grad_scale=grad_scale,
                found_inf=found_inf,
            )
        except RuntimeError:  # no step was taken
            torch._foreach_sub_(steps, 1)
            raise
        if found_inf is not None:  # GradScaler skips the step
            torch._foreach_sub_(steps, [(found_inf != 0).to(step) for step in steps])

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        squares = ("exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg_sq",)
        return ("exp_avg", *squares, "step")

    def _step_memory(self, group: dict[str, Any], tensors: bytes, grads: list[int]) -> None:
        beta1, beta2 = group["betas"]
        _C.masked_adamw_memory(
            tensors,
            grads,
            float(group["lr"]),
            float(beta1),
            float(beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            group["maximize"],
        )


def keep_pruned(optimizer: Optimizer, masks: Masks) -> RemovableHandle:
    """Keeps the weights of ``masks`` pruned under any torch optimiser.

    After every step the pruned weights and the floating-point state of their parameter's shape
    (momentum, averages) are set to 0.0, so neither momentum nor weight decay revives them. One more
    pass over the weights per step: ``MaskedSGD`` and ``MaskedAdamW`` do without.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: the optimiser has none of the masked parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if all(masks.for_parameter(parameter) is None for parameter in parameters):
        raise ValueError(
            "keep_pruned: masks must cover some of the optimiser's parameters (got none of them; "
            "after copying a model, call Masks.rebind)"
        )

    @torch.no_grad()
    def clear(stepped: Optimizer, args: object, kwargs: object) -> None:
        tensors, words = [], []
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if (mask := masks.for_parameter(parameter)) is None:
                    continue
                owned = [
                    value
                    for key, value in stepped.state.get(parameter, {}).items()
                    if key != "step"
                    and isinstance(value, Tensor)
                    and value.is_floating_point()
                    and value.shape == parameter.shape
                ]
                tensors += [parameter, *owned]
                words += [mask] * (1 + len(owned))
        apply_masks_(tensors, words)

    return optimizer.register_step_post_hook(clear)


def _rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A tensor stays one: a graph reads it anew, and a GPU's step does not wait for it."""
    return lr.to(device) if isinstance(lr, Tensor) else float(lr)


def _grad(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None  # step() has left out parameters without one
    return grad
