"""Nodes that hand each channel on by itself: where its dim goes, and how often it is repeated."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graph import BATCH_NORM, rectifier_function, shape_of
from .gate import AffineGate, ConstantBias
from .layers import CONV, CONV_TRANSPOSE, ELEMENTWISE

Shape = tuple[int, ...]

#: Pools by the number of spatial dims: on a value of another rank they would mix channels.
_POOLS = {
    1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}
_POOL_FUNCTIONS = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d)
_ELEMENTWISE = (torch.sigmoid, F.sigmoid, F.hardsigmoid, torch.tanh, F.tanh, F.hardtanh)
_ELEMENTWISE_METHODS = ("sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone", "clamp")
_WITH_A_NUMBER = (
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(torch.add, torch.sub, torch.mul, torch.div),
)
_METHODS_WITH_A_NUMBER = ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
_SCALES = (
    *(operator.mul, operator.truediv, operator.imul, operator.itruediv, torch.mul, torch.div),
    *("mul", "mul_", "div", "div_"),
)
_RESHAPES = (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze)
_RESHAPE_METHODS = ("flatten", "view", "reshape", "squeeze", "unsqueeze")
_REARRANGES = ("permute", torch.permute, "transpose", torch.transpose, "expand", "expand_as")
_MEANS = ("mean", torch.mean, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)
_UNIFORM = (
    *(*CONV, *CONV_TRANSPOSE, *BATCH_NORM),
    *(nn.Linear, nn.LayerNorm, nn.Flatten, nn.PReLU, AffineGate, ConstantBias),
    *(kind for kinds in _POOLS.values() for kind in kinds),
)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


def moved(
    node: fx.Node, module: nn.Module | None, dim: int, before: Shape, after: Shape
) -> tuple[int, int] | None:
    """Where channels go that lie on ``dim`` of the one tensor that a node reads.

    Returns:
        Their dim in the node's value and how many places each takes there (behind a flatten), or
        None for a node that mixes channels, or is not known.
    """
    if is_elementwise(node, module):
        return dim, 1
    if dim == 1 and _pools(node, module, len(before) - 2):
        return dim, 1
    name = node.target if node.op in ("call_method", "call_function") else None
    if type(module) is nn.Flatten or name in _RESHAPES or name in _RESHAPE_METHODS:
        return _reshaped(dim, before, after)
    if name in ("permute", torch.permute, "transpose", torch.transpose):
        return _permuted(node, dim, len(before))
    if name in ("mean", torch.mean):
        return _averaged(node, dim, len(before))
    if name is F.pad:
        pads = node.args[1] if len(node.args) > 1 else ()
        beside = isinstance(pads, Sequence) and len(before) - len(pads) // 2 > dim
        return (dim, 1) if beside else None
    return None


def is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node that reads one tensor maps every element by itself, whatever its place."""
    if module is not None:
        one_slope = type(module) is nn.PReLU and module.weight.numel() == 1
        return type(module) in ELEMENTWISE or one_slope
    if rectifier_function(node) is not None:
        return True
    function = node.op == "call_function"
    if node.target in (_ELEMENTWISE if function else _ELEMENTWISE_METHODS):
        return True
    tensors = [a for a in node.args if isinstance(a, fx.Node) and shape_of(a) is not None]
    known = node.target in (_WITH_A_NUMBER if function else _METHODS_WITH_A_NUMBER)
    return known and len(node.args) == 2 and len(tensors) == 1


def _pools(node: fx.Node, module: nn.Module | None, spatial: int) -> bool:
    """Whether a node pools each channel of a batch of images by itself."""
    if node.op == "call_function":
        options = node.kwargs.get("return_indices", False)
        return spatial == 2 and node.target in _POOL_FUNCTIONS and not options
    return type(module) in _POOLS.get(spatial, ()) and not getattr(module, "return_indices", False)


def _reshaped(dim: int, before: Shape, after: Shape) -> tuple[int, int] | None:
    if after[: dim + 1] == before[: dim + 1]:
        return dim, 1
    if len(after) == dim + 1 and after[:dim] == before[:dim]:
        return dim, math.prod(before[dim + 1 :])
    if dim == len(before) - 1 and after[-1:] == before[-1:]:
        return len(after) - 1, 1
    return None


def written_size(node: fx.Node, dim: int) -> bool:
    """Whether a view or reshape gives ``dim`` a size that is a number in the code, not -1."""
    if str(getattr(node.target, "__name__", node.target)) not in ("view", "reshape"):
        return False
    sizes = [*node.args[1:], *node.kwargs.values()]
    if len(sizes) == 1 and isinstance(sizes[0], Sequence):
        sizes = list(sizes[0])
    size = sizes[dim] if dim < len(sizes) else None
    return type(size) is int and size != -1


def _dims(given: Any, ndim: int) -> list[int] | None:
    """Dims as a call names them, counted from the front; None where they are not numbers."""
    given = list(given) if isinstance(given, Sequence) else [given]
    if len(given) == 1 and isinstance(given[0], Sequence):
        given = list(given[0])
    return [d % ndim for d in given] if all(type(d) is int for d in given) else None


def _permuted(node: fx.Node, dim: int, ndim: int) -> tuple[int, int] | None:
    dims = _dims(node.args[1:], ndim)
    if node.kwargs or dims is None:
        return None
    if "permute" not in str(getattr(node.target, "__name__", node.target)):
        order = list(range(ndim))
        order[dims[0]], order[dims[1]] = dims[1], dims[0]
        dims = order
    return dims.index(dim), 1


def _averaged(node: fx.Node, dim: int, ndim: int) -> tuple[int, int] | None:
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = _dims(given, ndim)
    if dims is None or dim in dims:
        return None
    kept = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    return (dim if kept else dim - sum(d < dim for d in dims)), 1


def scales(node: fx.Node) -> bool:
    """Whether a call multiplies a tensor by a number, or divides it by one."""
    first = node.args[0] if node.args else None
    return node.target in _SCALES and isinstance(first, fx.Node) and shape_of(first) is not None


def reshapes(node: fx.Node) -> bool:
    """Whether a call gives the same numbers in another shape; sizes that it reads say which."""
    return node.op in ("call_function", "call_method") and (
        node.target in (*_RESHAPES, *_RESHAPE_METHODS, *_REARRANGES)
    )


def is_uniform(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node of one input makes an image of one colour another one, whatever its size.

    Beside its border, that is; and strides are the only reason for its size to change.
    """
    if module is not None:
        return type(module) in _UNIFORM or is_elementwise(node, module)
    return (
        is_elementwise(node, None)
        or is_concatenation(node)
        or reshapes(node)
        or (node.op in ("call_function", "call_method") and node.target in _MEANS)
    )


def is_concatenation(node: fx.Node) -> bool:
    """Whether a node is torch.cat of values that it lists."""
    parts = node.args[0] if node.args else None
    return (
        node.op == "call_function"
        and node.target in _CONCATENATIONS
        and isinstance(parts, Sequence)
        and all(isinstance(part, fx.Node) for part in parts)
        and len(node.args) + len(node.kwargs) <= 2
    )


def concatenated(node: fx.Node, ndim: int) -> tuple[list[fx.Node], int]:
    """The values that a concatenation puts side by side, and along which dim."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    assert isinstance(dim, int)
    return list(node.args[0]), dim % ndim  # type: ignore[arg-type]


def asks_for(node: fx.Node, dim: int) -> bool:
    """Whether a node that reads a value's shape hands on its size along ``dim``."""
    ndim = len(shape_of(node.all_input_nodes[0]) or ())
    name = node.target if node.op == "call_method" else node.args[1]
    if name in ("dim", "ndim", "dtype", "device"):
        return False
    if name not in ("size", "shape"):
        return True
    one = node.kwargs.get("dim", node.args[1] if name == "size" and len(node.args) > 1 else None)
    if type(one) is int:
        return bool(node.users) and one % ndim == dim
    for user in node.users:
        place = user.args[1] if user.target is operator.getitem else None
        if not isinstance(place, int | slice):
            return True
        held = range(ndim)[place]
        if dim in (held if isinstance(held, range) else (held,)):
            return True
    return False
