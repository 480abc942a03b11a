"""Calls of aten operators, of which exported graphs are made, as the Python calls they came from.

Rules, rectifiers and saved files know ``torch.add`` and ``F.gelu``, not ``aten.add.Tensor``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

#: op, target, args, kwargs of a node.
Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]

_SAME_IN_F = """relu gelu silu hardswish leaky_relu prelu relu6 linear conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d dropout pad max_pool1d max_pool2d
    max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d scaled_dot_product_attention pixel_shuffle"""
#: Operators whose arguments are those of a function outside of ``torch`` itself.
_FUNCTIONS: Mapping[str, Any] = {
    **{name: getattr(F, name) for name in _SAME_IN_F.split()},
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "bitwise_not": operator.invert,
}
#: Checks of shapes and dtypes; a graph computes the same without them.
_CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
_END = 2**63 - 1


def is_check(node: fx.Node) -> bool:
    """Whether a node of an exported graph only asserts something."""
    return operator_name(node) in _CHECKS


def operator_name(node: fx.Node) -> str:
    """Name of the aten operator that a node calls, without overload; "" for any other node."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else ""


def plain_call(node: fx.Node) -> Call:
    """A node of an exported graph as a Python call; as it is where there is none."""
    name = operator_name(node)
    args = tuple(node.args)
    kwargs = {
        key: value
        for key, value in node.kwargs.items()
        if value is not None and key not in ("layout", "pin_memory")
    }
    if not name:
        return node.op, node.target, args, kwargs
    if name in _SPECIAL:
        return _SPECIAL[name](node, args, kwargs)
    if name in _FUNCTIONS:
        return "call_function", _FUNCTIONS[name], args, kwargs
    if getattr(torch, name, None) is not None and not name.startswith("_"):
        return "call_function", getattr(torch, name), args, kwargs
    if hasattr(Tensor, name) and args and isinstance(args[0], fx.Node):
        return "call_method", name, args, kwargs
    return node.op, node.target, tuple(node.args), dict(node.kwargs)


def _get(args: tuple[Any, ...], place: int, default: Any = None) -> Any:
    return args[place] if len(args) > place else default


def _slice(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    start, end, step = _get(args, 2), _get(args, 3), _get(args, 4, 1)
    part = slice(start or None, None if end == _END else end, None if step == 1 else step)
    rank = args[0].meta["val"].ndim
    before = (slice(None),) * (_get(args, 1, 0) % rank)
    return "call_function", operator.getitem, (args[0], (*before, part)), {}


def _index(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    indices = tuple(slice(None) if index is None else index for index in args[1])
    return "call_function", operator.getitem, (args[0], indices), {}


def _to(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A cast stays a cast; a device is named only where it changes."""
    before, after = args[0].meta["val"], node.meta["val"]
    kept: dict[str, Any] = {}
    if before.device != after.device:
        kept["device"] = after.device
    if before.dtype != after.dtype or not kept:
        kept["dtype"] = after.dtype
    return "call_method", "to", (args[0],), kept


def _batch_norm(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    x, weight, bias, mean, var, training, momentum, eps = args[:8]
    call = (x, mean, var, weight, bias, training, momentum, eps)
    return "call_function", F.batch_norm, call, {}


def _layer_norm(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return "call_function", F.layer_norm, (args[0], tuple(args[1]), *args[2:5]), {}


def _embedding(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return "call_function", F.embedding, (args[1], args[0]), {}  # the rest concerns gradients


def _copy(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return "call_method", "clone", args[:1], {}


def _size(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return "call_method", "size", args, {}


def _hardtanh(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if args[1:] == (0.0, 6.0):
        return "call_function", F.relu6, args[:1], {}
    return "call_function", F.hardtanh, args, kwargs


_SPECIAL = {
    "slice": _slice,
    "index": _index,
    "to": _to,
    "_to_copy": _to,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    "lift_fresh_copy": _copy,
    "lift_fresh": _copy,
    "alias": _copy,
    "sym_size": _size,
    "hardtanh": _hardtanh,
}
