"""Activations that are rectifiers by what they compute, not by name: named, never folded."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .inputs import owner_path

_CLAMPS: set[Any] = {
    torch.clamp,
    torch.clamp_min,
    torch.clip,
    "clamp",
    "clamp_",
    "clamp_min",
    "clip",
}
_CURVES: set[Any] = {torch.sigmoid, torch.tanh, torch.erf, torch.special.erf, F.sigmoid, F.tanh}
_CURVES |= {"sigmoid", "tanh", "erf"}
_PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"}
_ARITHMETIC: set[Any] = _PRODUCTS | {
    *(operator.add, operator.iadd, operator.sub, operator.truediv, operator.pow, operator.neg),
    *(torch.add, torch.sub, torch.div, torch.pow, torch.square, torch.neg),
    *("add", "add_", "sub", "div", "pow", "square", "neg"),
}


def unrecognised(module: fx.GraphModule) -> dict[str, str]:
    """Why activations that act as rectifiers are not seen as such, by their place in the model.

    ``clamp(min=0)``, ``F.threshold(x, 0, 0)`` and ``Hardtanh(0, 6)``; and formulas x g(x) with g of
    a sigmoid, tanh or erf of x: the GELUs that transformers writes out.
    """
    found: dict[str, str] = {}
    for node in module.graph.nodes:
        instead = _piecewise(module, node) or _formula(module, node)
        if instead is not None:
            place = str(node.target) if node.op == "call_module" else owner_path(node) or node.name
            found[place] = (
                f"{place!r} acts as a rectifier but is not one that is recognised, so it is "
                f"neither measured nor folded; use {instead}"
            )
    return found


def _piecewise(module: fx.GraphModule, node: fx.Node) -> str | None:
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    low: Any = None
    high: Any = None
    if type(called) is nn.Hardtanh:
        low, high = called.min_val, called.max_val
    elif type(called) is nn.Threshold:
        low, high = (0 if called.threshold == called.value == 0 else None), None
    elif node.op not in ("call_function", "call_method"):
        return None
    elif node.target in (F.threshold, torch.threshold):
        low = (
            0 if [_argument(node, 1, "threshold"), _argument(node, 2, "value")] == [0, 0] else None
        )
    elif node.target is F.hardtanh:
        low, high = _argument(node, 1, "min_val", -1.0), _argument(node, 2, "max_val", 1.0)
    elif node.target in _CLAMPS:
        low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    if not isinstance(low, int | float) or low != 0:
        return None
    if high is None or high == math.inf:
        return "nn.ReLU"
    return "nn.ReLU6" if high == 6 else None


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _formula(module: fx.GraphModule, node: fx.Node) -> str | None:
    """Whether a sigmoid, tanh or erf of some x only is multiplied by that x."""
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    function = node.op in ("call_function", "call_method") and node.target in _CURVES
    if type(called) not in (nn.Sigmoid, nn.Tanh) and not function:
        return None
    reads = _entrances(node)
    stack, seen = list(node.users), set[fx.Node]()
    while stack:
        user = stack.pop()
        if user in seen or user.target not in _ARITHMETIC:
            continue
        seen.add(user)
        others = [n for n in user.all_input_nodes if n is not node and n not in seen]
        if user.target in _PRODUCTS and any(_entrances(n, inclusive=True) & reads for n in others):
            return "nn.SiLU or nn.GELU"
        stack += list(user.users)
    return None


def _entrances(node: fx.Node, inclusive: bool = False) -> set[fx.Node]:
    """Values from which arithmetic alone leads to ``node`` (or, inclusive, itself)."""
    found, stack = set[fx.Node](), [node] if inclusive else list(node.all_input_nodes)
    seen = set[fx.Node]()
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.target in _ARITHMETIC and one.op in ("call_function", "call_method"):
            stack += one.all_input_nodes
        else:
            found.add(one)
    return found
