"""The runtime ends of tracking: what stands in for a rectifier while it is counted.

A rectifier module keeps its identity, parameters and hooks: only its class is exchanged for a
subclass with a counting ``forward`` (as ``torch.nn.utils.parametrize`` does). Functional calls
(``F.relu``, ``x.relu()``) are caught by a ``TorchFunctionMode`` that is active during the
forward of the modules that make them, and of no other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.eager import rectify_eager
from ..ops.rectify import apply_torch, count_signs, new_ledger, rectify
from .fusing import Pending, take_pending
from .rectifiers import Call, Kind, module_call, parse_function
from .sites import Site
from .valid import positions_mask

#: Attribute of a tracked module that holds its tap.
TAP = "_layer_collapse_tap"


class Shared:
    """What all taps of a tracker read: the mask of the positions that count."""

    valid: Tensor | None = None
    explicit: bool = False  # set by valid(mask), which goes before an attention_mask


class Counter:
    """One site and its ledger."""

    def __init__(self, site: Site, device: torch.device) -> None:
        self.site = site
        self.ledger = new_ledger(site.kind, site.neurons, device)

    def count(self, call: Call, valid: Tensor | None) -> Tensor:
        site, x, original = self.site, call.x, call
        if call.kind.code != site.kind.code:  # not by identity: a copied model has copied kinds
            raise RuntimeError(
                f"rectifier {site.name!r} was traced as {site.kind.name} and is called as "
                f"{call.kind.name}: control flow changed the order of the calls; track the model "
                "with example_inputs that take the same path"
            )
        if valid is None and call.weight is None and not torch.compiler.is_compiling():
            y = self.shortcut(x, call.slope, call.inplace)
            if y is not None:
                return y
        if self.ledger.device != x.device:
            self.ledger = self.ledger.to(x.device)
        self._check_shape(x)
        dim = site.channel_dim
        if site.split is not None:
            _, channels, inner = site.split  # what lies outside may hold the batch
            dim = dim % x.dim() + 1
            outer = x.shape[dim - 1] // (channels * inner)
            # not unflatten, which dynamo cannot trace under a TorchFunctionMode
            x = x.view(*x.shape[: dim - 1], outer, channels, inner, *x.shape[dim:])
            call = replace(call, x=x.clone() if call.inplace else x, inplace=False)
        if valid is not None:
            valid = positions_mask(valid, x.shape, dim, site.name)
        if site.split is not None and call.weight is not None and call.weight.numel() > 1:
            count_signs(call, self.ledger, dim, valid)  # slopes are not per neuron here
            return apply_torch(original)
        y = rectify(call, self.ledger, dim, valid)
        if site.split is not None:
            y = y.flatten(dim - 1, dim + 1)
        return original.x.copy_(y) if original.inplace and site.split is not None else y

    def shortcut(self, x: Tensor, slope: float, inplace: bool) -> Tensor | None:
        """:meth:`count` in eager mode without the op, or None, with nothing done."""
        site = self.site
        if site.split is not None:
            return None
        return rectify_eager(
            site.kind, x, self.ledger, site.neurons, site.channel_dim, slope, inplace
        )

    def _check_shape(self, x: Tensor) -> None:
        site = self.site
        dim, split = site.channel_dim, site.split
        size = x.shape[dim] if -x.dim() <= dim < x.dim() else -1
        fits = size == site.neurons
        if split is not None:
            fits = size >= 0 and size % (split[1] * split[2]) == 0
        if not fits:
            raise RuntimeError(
                f"rectifier {site.name!r}: expected {site.neurons} neurons in dim {dim} of its "
                f"input (got shape {tuple(x.shape)}); track the model with example_inputs of the "
                "shape that it is run on"
            )


class Tap:
    """Runtime end of one source of rectifier calls: sends its n-th call to the n-th ledger."""

    def __init__(self, name: str, kind: Kind | None, total: int, shared: Shared) -> None:
        self.name = name
        self.kind = kind  # of a module; functional calls say theirs
        self.total = total  # calls per forward of the scope, as traced
        self.counters: dict[int, Counter] = {}  # ignored calls have none
        self.shared = shared
        self.calls = 0
        self.per_forward: int | None = None  # functional calls per forward of the owner

    def shortcut(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The output of a rectifier module in eager mode, or None, with nothing done."""
        if self.total != 1 or self.shared.valid is not None or torch.compiler.is_compiling():
            return None
        counter = self.counters.get(0)
        if counter is None or counter.site.kind is not self.kind:
            return None
        attributes = module.__dict__
        return counter.shortcut(
            x, attributes.get("negative_slope", 0.0), attributes.get("inplace", False)
        )

    def count(self, call: Call) -> Tensor:
        index = 0
        if self.total != 1:
            index = self.calls
            if index >= self.total:
                return self._unexpected(call)
            self.calls = index + 1
        if index not in self.counters:
            return apply_torch(call)
        if type(call.x) is Pending:
            return take_pending(call, self.counters[index])
        return self.counters[index].count(call, self.shared.valid)

    def _unexpected(self, call: Call) -> Tensor:
        # Activation checkpointing replays calls after the scope's forward: not counted again.
        if self.total and torch._C._current_graph_task_id() != -1:
            return take_pending(call, None) if type(call.x) is Pending else apply_torch(call)
        raise RuntimeError(
            f"rectifier {self.name!r} is called more often than the traced graph shows "
            f"({self.total} calls): control flow hides it; leave it out with ignore=... or track "
            "the model with example_inputs that take the same path"
        )

    def check_seen(self, seen: int) -> None:
        """At the end of an owner's forward: none of its functional calls went by uncounted."""
        if self.per_forward is not None and seen != self.per_forward:
            raise RuntimeError(
                f"rectifier {self.name!r}: {seen} calls were seen in one forward instead of "
                f"{self.per_forward}; torch.compile hides F.hardswish, F.relu_ and F.leaky_relu_ "
                "(call the module instead), and control flow must be as in the trace"
            )

    def restart(self, *_: Any) -> None:
        """Forward pre-hook of the scope: the next call is the first."""
        self.calls = 0


class _CountingMode(TorchFunctionMode):
    """Counts the functional rectifiers of the forward that it is active in."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap
        self.seen = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        call = parse_function(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        self.seen += 1
        return self.tap.count(call)


_tracked_classes: dict[tuple[type, bool], type] = {}


def tracked_class(original: type[nn.Module], functional: bool) -> type[nn.Module]:
    """The counting subclass of a module class."""
    key = (original, functional)
    if key not in _tracked_classes:

        @wraps(original.forward)  # callers read the signature
        def watch_functions(self: Any, *args: Any, **kwargs: Any) -> Any:
            mode = _CountingMode(getattr(self, TAP))
            with mode:
                result = original.forward(self, *args, **kwargs)
            mode.tap.check_seen(mode.seen)
            return result

        def count(self: Any, input: Tensor) -> Tensor:  # the name that torch's modules use
            tap: Tap = getattr(self, TAP)
            assert tap.kind is not None
            y = tap.shortcut(self, input)
            if y is not None:
                return y
            return tap.count(module_call(self, tap.kind, input))

        forward = watch_functions if functional else count
        _tracked_classes[key] = type(original.__name__, (original,), {"forward": forward})
    return _tracked_classes[key]


def untracked_class(cls: type, ours: type, original: type) -> type:
    """``cls``, which is ``ours`` or was derived from it, as it would be had ``ours`` not been."""
    if cls is ours:
        return original
    bases = tuple(untracked_class(base, ours, original) for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    body = {key: v for key, v in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, body)
