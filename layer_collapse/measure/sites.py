"""Where the rectifiers of a model stand: which layer feeds each, and which dim its neurons lie on.

The feeding layer decides the channel dim (Linear: last; convolution, batch norm: dim 1), followed
through permute, view, flatten and the like. The rank of a tensor alone cannot tell [N, C, L] from
[B, T, C].
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..graph import (
    BATCH_NORM,
    WEIGHTED,
    TraceError,
    call_counts,
    carries_data,
    owner_path,
    reaches_output,
    rectifier_function,
    rectifier_nodes,
    shape_of,
    submodule,
)
from .rectifiers import KINDS, Kind, module_kind, parse_function


@dataclass(frozen=True)
class Site:
    """One call of one rectifier.

    Attributes:
        name: the module's path, or the owner's path and the function ("block.0:relu"); "#2" and so
            on for further calls of the same.
        kind: the rectifier.
        source: path of the rectifier module, or of the module whose forward calls the function.
        functional: whether it is a function call.
        index: which call of ``source`` this is within one forward pass, from 0.
        node: name of its node in the traced graph.
        neurons: number of channels C.
        channel_dim: dim of the rectifier's input that holds the channels.
        split: (outer, C, inner) where that dim holds more than channels (flattened), else None.
        feeding: path of the linear or convolutional module whose output it sees, else None.
        norm: paths of normalisations between the two.
        candidate: whether pruning the feeding layer alone can make this rectifier linear.
        why_not: the reason where it is no candidate, else "".
        way_around: whether the output still depends on the input when this rectifier is constant.
    """

    name: str
    kind: Kind
    source: str
    functional: bool
    index: int
    node: str
    neurons: int
    channel_dim: int
    split: tuple[int, int, int] | None
    feeding: str | None
    norm: tuple[str, ...]
    candidate: bool
    why_not: str
    way_around: bool


@dataclass(frozen=True)
class _Origin:
    """Where a value's channels come from: dim, and (outer, C, inner) within that dim."""

    channels: int
    dim: int
    outer: int = 1
    inner: int = 1
    feeding: str | None = None
    norm: tuple[str, ...] = ()
    why_not: str = ""


_LAST_DIM = (nn.Linear, nn.Embedding)
_POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ELEMENTWISE_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    *{kind.module for kind in KINDS.values()},
)
_ELEMENTWISE_METHODS = {
    "contiguous",
    "clone",
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "detach",
}
_ELEMENTWISE_FUNCTIONS = {F.dropout, torch.clone, torch.detach}
_POOL_FUNCTIONS = {
    pool + f"_pool{n}d" for pool in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)
}
_POOL_FUNCTIONS |= {f"adaptive_max_pool{n}d" for n in (1, 2, 3)}
_TWO_OPERANDS = {operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.mul}
_TWO_OPERANDS |= {torch.sub, operator.isub, operator.imul, operator.truediv, torch.div}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"}
_RESHAPE_FUNCTIONS = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten}
_REDUCTIONS = {torch.cat, torch.concat}


def _padding(pool: nn.Module) -> tuple[int, ...]:
    """A pool's padding; averaged with zeros, a constant would not stay one at the border."""
    padding: Any = pool.padding
    return (padding,) if isinstance(padding, int) else tuple(padding)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


class _Origins:
    """Follows every value of a graph back to the layer whose output channels it carries."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.known: dict[fx.Node, _Origin | None] = {}
        for node in module.graph.nodes:
            self.known[node] = self._of(node)

    def _input(self, node: fx.Node, position: int = 0) -> _Origin | None:
        inputs = node.all_input_nodes
        return self.known.get(inputs[position]) if len(inputs) > position else None

    def _of(self, node: fx.Node) -> _Origin | None:
        if node.op == "call_module":
            return self._of_module(node, self.module.get_submodule(str(node.target)))
        if rectifier_function(node) is not None:
            return self._after_rectifier(node)
        if node.op == "call_method":
            if node.target in _ELEMENTWISE_METHODS:
                return self._input(node)
            if node.target in _RESHAPES:
                return self._reshaped(node)
            if node.target in ("permute", "transpose", "swapaxes"):
                return self._permuted(node)
            if node.target in ("add", "add_", "sub", "mul", "mul_", "div"):
                return self._combined(node)
        if node.op == "call_function":
            if node.target in _ELEMENTWISE_FUNCTIONS or _name(node) in _POOL_FUNCTIONS:
                return self._input(node)
            if node.target in _RESHAPE_FUNCTIONS:
                return self._reshaped(node)
            if node.target in (torch.permute, torch.transpose, torch.swapaxes):
                return self._permuted(node)
            if node.target in _TWO_OPERANDS or node.target in _REDUCTIONS:
                return self._combined(node)
            if node.target is F.linear or _name(node) in ("conv1d", "conv2d", "conv3d"):
                return self._functional_layer(node)
        return None

    def _of_module(self, node: fx.Node, called: nn.Module) -> _Origin | None:
        path = str(node.target)
        before = self._input(node)
        if isinstance(called, WEIGHTED):
            last = isinstance(called, nn.Linear)
            channels: Any = called.out_features if last else called.out_channels
            shape = shape_of(node)
            if last or shape is None:
                return _Origin(int(channels), -1 if last else 1, feeding=path)
            kernel: Any = called.kernel_size
            dim = len(shape) - len(kernel) - 1  # 0 for one sample without a batch dim
            return _Origin(int(channels), dim, feeding=path)
        if isinstance(called, nn.Embedding):
            return _Origin(called.embedding_dim, -1, why_not="it is fed by an embedding")
        if isinstance(called, (*BATCH_NORM, nn.GroupNorm, nn.LayerNorm)):
            if before is not None and self._per_neuron(node, called, before):
                return replace(before, norm=(*before.norm, path))
            if before is not None:
                why_not = f"{path!r} normalises something else than the neurons of its layer"
                return replace(before, feeding=None, norm=(*before.norm, path), why_not=why_not)
            if isinstance(called, nn.LayerNorm):
                channels, dim = called.normalized_shape[-1], -1
            else:
                channels = getattr(called, "num_features", getattr(called, "num_channels", 0))
                dim = 1
            return _Origin(int(channels), dim, norm=(path,), why_not="no layer of its own feeds it")
        if module_kind(called) is not None:
            return self._after_rectifier(node)
        if isinstance(called, (*_ELEMENTWISE_MODULES, *_POOLS)) or hasattr(called, "channel_dim"):
            return before
        if isinstance(called, _AVERAGES) and not any(_padding(called)):
            return before
        if isinstance(called, nn.Flatten | nn.Unflatten):
            return self._reshaped(node)
        return None

    def _per_neuron(self, node: fx.Node, norm: nn.Module, origin: _Origin) -> bool:
        """Whether a normalisation has one weight and bias per neuron.

        If not (batch norm over flattened images, layer norm over whole ones), a neuron whose layer
        is empty still takes a value of its own at every position.
        """
        layer = isinstance(norm, nn.LayerNorm)
        shape = norm.normalized_shape if isinstance(norm, nn.LayerNorm) else None
        sizes = shape or (getattr(norm, "num_features", getattr(norm, "num_channels", 0)),)
        if sizes != (origin.channels,) or (origin.outer, origin.inner) != (1, 1):
            return False
        known = shape_of(node)
        return known is None or (-1 if layer else 1) % len(known) == origin.dim % len(known)

    def _after_rectifier(self, node: fx.Node) -> _Origin | None:
        before = self._input(node)
        return before and replace(before, feeding=None, why_not="another rectifier feeds it")

    def _combined(self, node: fx.Node) -> _Origin | None:
        """A sum, product or concatenation: the dim is an operand's, the feeding layer is lost."""
        operands = [self.known.get(source) for source in node.all_input_nodes]
        known = [origin for origin in operands if origin is not None]
        if not known:
            return None
        alone = sum(isinstance(argument, fx.Node) for argument in node.args) == 1
        if alone and node.target not in _REDUCTIONS:
            return known[0]  # with a plain number
        first = known[0]
        shape = shape_of(node)
        channels = first.channels
        if node.target in _REDUCTIONS and (shape is None or first.inner != 1 or first.outer != 1):
            return None
        if shape is not None and first.inner == 1 and first.outer == 1:
            channels = shape[first.dim]  # more than the operand's after cat or broadcasting
        return replace(
            first,
            channels=channels,
            feeding=None,
            why_not=f"it sees the result of `{_name(node)}`, not its own layer alone",
        )

    def _functional_layer(self, node: fx.Node) -> _Origin | None:
        shape = shape_of(node)
        dim = -1 if node.target is F.linear else 1
        why_not = f"its feeding layer is the function `{_name(node)}`, not a module"
        return None if shape is None else _Origin(shape[dim], dim, why_not=why_not)

    def _permuted(self, node: fx.Node) -> _Origin | None:
        before = self._input(node)
        if before is None:
            return None
        given: tuple[Any, ...] = (*node.args, *node.kwargs.values())
        args: list[Any] = [value for value in given if not isinstance(value, fx.Node)]
        if _name(node) == "permute":
            dims = list(args[0]) if len(args) == 1 and not isinstance(args[0], int) else list(args)
        else:
            shape = shape_of(node)
            if shape is None:
                return None
            dims = list(range(len(shape)))
            a, b = (int(d) % len(dims) for d in args)
            dims[a], dims[b] = dims[b], dims[a]
        rank = len(dims)
        positions = [int(d) % rank for d in dims]
        return replace(before, dim=positions.index(before.dim % rank))

    def _reshaped(self, node: fx.Node) -> _Origin | None:
        """Follow the channels through a reshape by their stride in the flattened order."""
        before = self._input(node)
        old = shape_of(node.all_input_nodes[0])
        new = shape_of(node)
        if before is None or old is None or new is None:
            return None
        dim = before.dim % len(old)
        unit = before.inner * math.prod(old[dim + 1 :])  # elements between two channels
        period = unit * before.channels
        for candidate, size in enumerate(new):
            below = math.prod(new[candidate + 1 :])
            if below and below <= unit and unit % below == 0 and size * below % period == 0:
                outer = size * below // period
                if outer:
                    return replace(before, dim=candidate, outer=outer, inner=unit // below)
        return None


def _tied_parameters(module: nn.Module) -> set[int]:
    owners: Counter[int] = Counter()
    for submodule_ in module.modules():
        owners.update(id(p) for p in submodule_.parameters(recurse=False))
    return {key for key, count in owners.items() if count > 1}


def _has_other_readers(node: fx.Node, feeding: str) -> bool:
    """Whether something else than this rectifier reads the feeding layer's output."""
    value = node
    while str(value.target) != feeding or value.op != "call_module":
        value = value.all_input_nodes[0]
        if sum(carries_data(user) for user in value.users) != 1:
            return True
    return False


def _why_no_candidate(
    node: fx.Node, origin: _Origin, module: fx.GraphModule, calls: Counter[str], tied: set[int]
) -> str:
    if origin.feeding is None:
        return origin.why_not
    if calls[origin.feeding] > 1:
        return f"its feeding layer {origin.feeding!r} is called {calls[origin.feeding]} times"
    if any(id(p) in tied for p in module.get_submodule(origin.feeding).parameters()):
        return f"the weights of its feeding layer {origin.feeding!r} are shared"
    if _has_other_readers(node, origin.feeding):
        return f"the output of its feeding layer {origin.feeding!r} is also used elsewhere"
    return ""


def source_of(node: fx.Node) -> tuple[str, bool]:
    """What calls a rectifier: (the module's path, False) or (the owner's path, True)."""
    if rectifier_function(node) is None:
        return str(node.target), False
    return owner_path(node), True


def scope_of(module: fx.GraphModule, nodes: list[fx.Node]) -> str:
    """Path of the smallest module that makes all these calls, and makes them once per forward."""
    stacks = [list((node.meta.get("nn_module_stack") or {}).items()) for node in nodes]
    stacks = [
        stack[:-1] if node.op == "call_module" else stack
        for node, stack in zip(nodes, stacks, strict=True)
    ]
    every_key = {key for n in module.graph.nodes for key in n.meta.get("nn_module_stack") or {}}
    scope = ""
    for level in zip(*stacks, strict=False):
        keys = {key for key, _ in level}
        path = str(level[0][1][0])
        if len(keys) > 1 or f"{path}@1" in every_key:  # fx names a second call of a module so
            break
        scope = path
    return scope


def calls_per_forward(nodes: list[fx.Node]) -> int | None:
    """How many of an owner's functional calls one of its forwards makes; None where they differ."""
    forwards = Counter(tuple(node.meta.get("nn_module_stack") or {}) for node in nodes)
    counts = set(forwards.values())
    return counts.pop() if len(counts) == 1 else None


def find_sites(module: fx.GraphModule, ignore: tuple[str, ...] = ()) -> list[Site]:
    """Every rectifier call of a traced model, in the order of execution.

    Args:
        module: result of :func:`layer_collapse.graph.trace`.
        ignore: names of rectifiers to leave out.

    Raises:
        TraceError: the dim that a rectifier's neurons lie on cannot be told; names the rectifier.
    """
    origins = _Origins(module)
    calls = call_counts(module)
    tied = _tied_parameters(module)
    seen: Counter[tuple[str, bool]] = Counter()
    names: Counter[str] = Counter()
    sites = []
    for node in rectifier_nodes(module):
        called = submodule(module, node)
        function = rectifier_function(node)
        source, functional = source_of(node)
        if function is None:
            assert called is not None
            kind = module_kind(called)
            base = str(node.target)
        else:
            call = parse_function(function, node.args, node.kwargs)
            assert call is not None
            kind = call.kind
            base = f"{source}:{_name(node).rstrip('_')}"
        assert kind is not None
        index = seen[source, functional]
        seen[source, functional] += 1
        names[base] += 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        if name in ignore:
            continue
        before = node.all_input_nodes[0]
        origin = origins.known[before]
        if origin is None:
            raise TraceError(
                f"cannot tell which dim of the input of rectifier {name!r} holds its neurons (it "
                f"comes from `{_name(before)}`); pass example_inputs so that shapes are known, or "
                f"leave it out with ignore=({name!r},)"
            )
        plain = origin.outer == 1 and origin.inner == 1
        why_not = _why_no_candidate(node, origin, module, calls, tied)
        sites.append(
            Site(
                name=name,
                kind=kind,
                source=source,
                functional=functional,
                index=index,
                node=node.name,
                neurons=origin.channels,
                channel_dim=origin.dim,
                split=None if plain else (origin.outer, origin.channels, origin.inner),
                feeding=origin.feeding,
                norm=origin.norm,
                candidate=why_not == "",
                why_not=why_not,
                way_around=reaches_output(module, without=node),
            )
        )
    return sites


def feeding_is_empty(model: nn.Module, site: Site) -> bool:
    """Whether every weight of the site's feeding layer is zero, so that its input is a constant."""
    if site.feeding is None:
        return False
    weight = model.get_submodule(site.feeding).weight
    return isinstance(weight, Tensor) and not bool(weight.detach().any())
