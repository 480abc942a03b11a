"""What an optimiser has learnt about the parameters that folding left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..prune.optim import MaskedAdamW, MaskedSGD

#: Optimisers that keep the same state under the same names.
_FAMILIES: Mapping[type, type] = {MaskedAdamW: torch.optim.AdamW, MaskedSGD: torch.optim.SGD}


@dataclass(frozen=True)
class TransferredState:
    """Parameters by name: whose state was carried over, and whose starts afresh, with the reason.

    ``gone`` are those of the model before that have left.
    """

    carried: tuple[str, ...]
    fresh: dict[str, str]
    gone: tuple[str, ...]


def transfer_optimizer_state(
    optimizer_before: Optimizer,
    model_before: nn.Module,
    model_after: nn.Module,
    optimizer_after: Optimizer,
) -> TransferredState:
    """Carry momentum, averages and step counts over to a folded model.

    A parameter keeps its state if the model before has one of the same name, shape, dtype and
    values: one that a fold changed stands for something else, so its gradients do too. Call it
    before ``model_after`` is trained. Learning rates and other options stay those of
    ``optimizer_after``; so do its masks, and state of pruned weights is zeroed.

    Args:
        optimizer_before: of ``model_before``; left as it is.
        model_before: the model that was trained, whose parameters ``optimizer_before`` holds: the
            one given to :func:`layer_collapse.linearize`, not the copy that it returned.
        model_after: what :func:`layer_collapse.fold` made of it.
        optimizer_after: of ``model_after``, of the same kind; a masked optimiser and torch's own of
            the same name are of one kind.

    Raises:
        TypeError: the optimisers are of different kinds.
        ValueError: the one before keeps state that belongs to no single parameter (L-BFGS) or
            holds no parameter of ``model_before``, or the one after holds none of ``model_after``.
            Nothing has changed.
    """
    if _kind(optimizer_before) is not _kind(optimizer_after):
        raise TypeError(
            "transfer_optimizer_state: expected two optimisers of one kind (got "
            f"{type(optimizer_before).__name__} and {type(optimizer_after).__name__})"
        )
    if isinstance(optimizer_before, torch.optim.LBFGS):
        raise ValueError(
            "transfer_optimizer_state: expected state that belongs to single parameters (got an "
            "LBFGS, whose history spans all of them); start it afresh"
        )
    before = dict(model_before.named_parameters(remove_duplicate=False))
    trained = {id(parameter) for parameter in _parameters(optimizer_before)}
    if not any(id(parameter) in trained for parameter in before.values()):
        raise ValueError(
            "transfer_optimizer_state: expected model_before to be the model that optimizer_before "
            "trained (got one of whose parameters it holds none); pass that model, not a "
            "linearised copy of it"
        )
    after = dict(model_after.named_parameters(remove_duplicate=False))
    index = {p: i for i, p in enumerate(_parameters(optimizer_after))}
    packed = optimizer_after.state_dict()
    carried, fresh = list[str](), dict[str, str]()
    for name, parameter in after.items():
        if parameter not in index:
            continue
        reason = _difference(before.get(name), parameter)
        state = {} if reason else optimizer_before.state.get(before[name], {})
        if reason or not state:
            fresh[name] = reason or "it had none"
            continue
        own = packed["state"].get(index[parameter], {})
        mask = {"mask": own["mask"]} if "mask" in own else {}
        copied = {key: v.clone() if isinstance(v, Tensor) else v for key, v in state.items()}
        packed["state"][index[parameter]] = copied | mask
        carried.append(name)
    if not carried and not fresh:
        raise ValueError(
            "transfer_optimizer_state: expected optimizer_after to hold parameters of model_after "
            "(got none of them)"
        )
    if carried:
        optimizer_after.load_state_dict(packed)
    gone = tuple(name for name in before if name not in after)
    return TransferredState(tuple(carried), fresh, gone)


def _kind(optimizer: Optimizer) -> type:
    return _FAMILIES.get(type(optimizer), type(optimizer))


def _parameters(optimizer: Optimizer) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _difference(old: Tensor | None, new: Tensor) -> str | None:
    """Why a parameter is not what it was, or None."""
    if old is None:
        return "it was not there"
    if old.shape != new.shape:
        return f"its shape was {list(old.shape)} and is {list(new.shape)}"
    if old.dtype != new.dtype:
        return f"its dtype was {old.dtype} and is {new.dtype}"
    same = torch.allclose(old.detach().to(new.device), new, rtol=0, atol=0, equal_nan=True)
    return None if same else "its values changed"
