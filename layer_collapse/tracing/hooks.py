"""Forward hooks of what a graph takes apart: they run in the model, not in the graph."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .inputs import TraceError, training_mode, without_cache

_DICTS = ("_forward_pre_hooks", "_forward_hooks")
#: Hooks of these packages stay: they compute weights (pruning, weight norm), shard or count.
_TRUSTED = ("torch", "layer_collapse")
LOST = "has forward hooks, which do not run in the graph; move what they do into forward"


def hooked(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by path that have hooks of their own and that tracing looks into, the root too."""
    return {
        path: module
        for path, module in model.named_modules()
        if (path == "" or not _is_leaf(module)) and any(_foreign(module, name) for name in _DICTS)
    }


def _is_leaf(module: nn.Module) -> bool:
    home = type(module).__module__
    inside = ("torch.nn.", "torch.ao.nn.", "layer_collapse.reduce.")
    return home.startswith(inside) and not isinstance(module, nn.Sequential)


def _foreign(module: nn.Module, name: str) -> list[int]:
    """Keys of the hooks that are neither torch's nor ours."""
    homes = {
        key: getattr(hook, "__module__", None) or type(hook).__module__
        for key, hook in getattr(module, name).items()
    }
    return [key for key, home in homes.items() if home.partition(".")[0] not in _TRUSTED]


@contextmanager
def without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No hook of the user's runs, for none expects what stands for a tensor during tracing."""
    before = [(module, name, getattr(module, name)) for module in modules for name in _DICTS]
    for module, name, hooks in before:
        foreign = _foreign(module, name)
        kept = OrderedDict((key, hook) for key, hook in hooks.items() if key not in foreign)
        setattr(module, name, kept)
    try:
        yield
    finally:
        for module, name, hooks in before:
            setattr(module, name, hooks)


def is_patched(model: nn.Module) -> bool:
    """Whether the object has another forward than its class, which torch.fx does not see."""
    return "forward" in vars(model) and not isinstance(model, fx.GraphModule)


def agrees(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], graphs: Any) -> bool:
    """Whether a model in evaluation mode gives what its graph gave, up to rounding."""
    args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad(), training_mode(model, False), without_cache(model):
        ours, theirs = tree_leaves(model(*args, **kwargs)), tree_leaves(graphs)
    return len(ours) == len(theirs) and all(map(_alike, ours, theirs))


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    near = 1e-5 if a.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(a.double().abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(a.double(), b.double(), rtol=0, atol=near * scale, equal_nan=True)


def refusal(model: nn.Module, hooks: dict[str, nn.Module]) -> TraceError:
    """The error that says why the graph gives something else than the model."""
    name = type(model).__name__
    if is_patched(model):
        cause = "its forward was replaced on the object; define it in the class"
    elif "" in hooks:
        cause = "its own forward hooks change the output; remove them or move them into forward"
    else:
        cause = f"the forward hooks of {next(iter(hooks))!r} change the output; remove them or "
        cause += "move them into forward"
    return TraceError(f"cannot trace {name}: {cause}")
