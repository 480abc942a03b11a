"""Following a value of the graph back to the layer whose output channels it carries.

The feeding layer decides the channel dim (Linear: last; convolution, batch norm: dim 1), followed
through permute, view, flatten and the like. The rank of a tensor alone cannot tell [N, C, L] from
[B, T, C].
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graph import BATCH_NORM, WEIGHTED, rectifier_function, shape_of
from ..reduce.gate import ConstantBias
from .rectifiers import KINDS, module_kind


@dataclass(frozen=True)
class Origin:
    """Where a value's channels come from: dim, and (outer, C, inner) within that dim."""

    channels: int
    dim: int
    outer: int = 1
    inner: int = 1
    feeding: str | None = None
    norm: tuple[str, ...] = ()
    why_not: str = ""


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


def call_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


class Origins:
    """Follows every value of a graph back to the layer whose output channels it carries."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.known: dict[fx.Node, Origin | None] = {}
        for node in module.graph.nodes:
            self.known[node] = self._of(node)

    def _input(self, node: fx.Node, position: int = 0) -> Origin | None:
        inputs = node.all_input_nodes
        return self.known.get(inputs[position]) if len(inputs) > position else None

    def _of(self, node: fx.Node) -> Origin | None:
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
            if node.target in _ELEMENTWISE_FUNCTIONS or call_name(node) in _POOL_FUNCTIONS:
                return self._input(node)
            if node.target in _RESHAPE_FUNCTIONS:
                return self._reshaped(node)
            if node.target in (torch.permute, torch.transpose, torch.swapaxes):
                return self._permuted(node)
            if node.target in _TWO_OPERANDS or node.target in _REDUCTIONS:
                return self._combined(node)
            if node.target is F.linear or call_name(node) in ("conv1d", "conv2d", "conv3d"):
                return self._functional_layer(node)
        return None

    def _of_module(self, node: fx.Node, called: nn.Module) -> Origin | None:
        path = str(node.target)
        before = self._input(node)
        if isinstance(called, WEIGHTED):
            last = isinstance(called, nn.Linear)
            channels: Any = called.out_features if last else called.out_channels
            shape = shape_of(node)
            if last or shape is None:
                return Origin(int(channels), -1 if last else 1, feeding=path)
            kernel: Any = called.kernel_size
            dim = len(shape) - len(kernel) - 1  # 0 for one sample without a batch dim
            return Origin(int(channels), dim, feeding=path)
        if isinstance(called, nn.Embedding):
            return Origin(called.embedding_dim, -1, why_not="it is fed by an embedding")
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
            return Origin(int(channels), dim, norm=(path,), why_not="no layer of its own feeds it")
        if module_kind(called) is not None:
            return self._after_rectifier(node)
        if isinstance(called, (*_ELEMENTWISE_MODULES, *_POOLS)) or hasattr(called, "channel_dim"):
            return before
        if isinstance(called, ConstantBias):  # its constant may differ from place to place
            why_not = "folding has added a constant to what its layer sends"
            return before and replace(before, feeding=None, why_not=why_not)
        if isinstance(called, _AVERAGES) and not any(_padding(called)):
            return before
        if isinstance(called, nn.Flatten | nn.Unflatten):
            return self._reshaped(node)
        return None

    def _per_neuron(self, node: fx.Node, norm: nn.Module, origin: Origin) -> bool:
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

    def _after_rectifier(self, node: fx.Node) -> Origin | None:
        before = self._input(node)
        return before and replace(before, feeding=None, why_not="another rectifier feeds it")

    def _combined(self, node: fx.Node) -> Origin | None:
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
            why_not=f"it sees the result of `{call_name(node)}`, not its own layer alone",
        )

    def _functional_layer(self, node: fx.Node) -> Origin | None:
        shape = shape_of(node)
        dim = -1 if node.target is F.linear else 1
        why_not = f"its feeding layer is the function `{call_name(node)}`, not a module"
        return None if shape is None else Origin(shape[dim], dim, why_not=why_not)

    def _permuted(self, node: fx.Node) -> Origin | None:
        before = self._input(node)
        if before is None:
            return None
        given: tuple[Any, ...] = (*node.args, *node.kwargs.values())
        args: list[Any] = [value for value in given if not isinstance(value, fx.Node)]
        if call_name(node) == "permute":
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

    def _reshaped(self, node: fx.Node) -> Origin | None:
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
