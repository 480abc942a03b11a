"""Walking the graph: what stands before and behind a node, seen through dropouts."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from .layers import DROPOUT
from .work import Work

_SUMS = (operator.add, operator.iadd, torch.add, Tensor.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, Tensor.mul)
_IN_PLACE = (operator.iadd, operator.imul)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``, or None if there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def passes_through(work: Work, node: fx.Node) -> bool:
    """Whether a node hands on its input as it is in evaluation (dropout, identity; no hooks)."""
    kind = type(work.called(node))
    return (
        kind in (nn.Identity, *DROPOUT) and len(node.all_input_nodes) == 1 and not work.hooked(node)
    )


def above(work: Work, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a one-input node reads, and the dropouts between, from the bottom up."""
    source, between = node.all_input_nodes[0], []
    while passes_through(work, source):
        between.append(source)
        source = source.all_input_nodes[0]
    return source, between


def read_elsewhere(chain: list[fx.Node]) -> fx.Node | None:
    """The first node of a chain that more than one node reads, or None."""
    return next((node for node in chain if len(node.users) != 1), None)


def _pair(node: fx.Node, functions: tuple[object, ...], name: str) -> tuple[object, object] | None:
    if node.op == "call_function" and node.target in functions:
        in_place = node.target in _IN_PLACE
    elif node.op == "call_method" and node.target in (name, name + "_"):
        in_place = str(node.target).endswith("_")
    else:
        return None
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
        return None
    first = node.args[0]
    if in_place and not (isinstance(first, fx.Node) and len(first.users) == 1):
        return None  # others read what is written over
    return node.args[0], node.args[1]


def summands(node: fx.Node) -> tuple[object, object] | None:
    """The two operands of a plain sum, or None for any other node."""
    return _pair(node, _SUMS, "add")


def factors(node: fx.Node) -> tuple[object, object] | None:
    """The two operands of a product, or None for any other node."""
    return _pair(node, _PRODUCTS, "mul")


def free_path(work: Work, stem: str) -> str:
    """A path for a new module: ``stem`` and a number that nothing has yet."""
    number = 0
    while hasattr(work.module, f"{stem}_{number}"):
        number += 1
    return f"{stem}_{number}"
