"""Rectifiers in disguise: code that computes one without calling it, so that nothing counts it.

``x.clamp(min=0)`` is a ReLU whose gradient at 0 differs, ``x * torch.sigmoid(1.702 * x)`` a GELU by
formula. They are named instead of measured: to put another function in their place would change the
user's network.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from ..graph import owner_path, submodule
from .origins import Origins, call_name

_BOUNDED = {"tanh", "sigmoid", "erf", "hardsigmoid"}
_BOUNDED_MODULES = (nn.Tanh, nn.Sigmoid, nn.Hardsigmoid)
_PRODUCTS = {"mul", "imul", "mul_"}
_POINTWISE = _BOUNDED | _PRODUCTS
_POINTWISE |= {"add", "iadd", "add_", "sub", "div", "truediv", "pow", "square", "neg"}
_POINTWISE |= {"to", "float", "type_as"}
# Arguments after the input, with their defaults: (name of the lower bound, of the upper one).
_BOUNDS = {
    "clamp": (("min", None), ("max", None)),
    "clip": (("min", None), ("max", None)),
    "clamp_min": (("min", None), None),
    "hardtanh": (("min_val", -1.0), ("max_val", 1.0)),
}


def lookalikes(module: fx.GraphModule, origins: Origins) -> list[str]:
    """One sentence for every rectifier that a traced model computes without calling it."""
    gates = _Gates(module)
    found = []
    for node in module.graph.nodes:
        source = gates.source(node)
        if source is None or origins.known[source] is None:
            continue  # not on channels: a distance or a probability that is kept in its range
        instead = _by_bounds(node, submodule(module, node))
        if instead is None and gates.gated_by_itself(node):
            instead = "F.gelu or F.silu"
        if instead is not None:
            found.append(
                f"{owner_path(node)!r} rectifies by `{call_name(node)}` (node {node.name!r}), "
                "which is not measured and cannot leave the network; "
                f"call {instead} to have it counted"
            )
    return found


def _by_bounds(node: fx.Node, called: nn.Module | None) -> str | None:
    """What to call instead of a clamp to [0, inf) or [0, 6]; None for anything else."""
    name = call_name(node).strip("_")  # F.threshold calls itself _threshold
    lower: Any
    upper: Any
    if isinstance(called, nn.Threshold):
        lower, upper = called.threshold if called.threshold == called.value else None, None
    elif type(called) is nn.Hardtanh:
        lower, upper = called.min_val, called.max_val
    elif called is not None:
        return None
    elif name == "threshold":
        given = [*node.args[1:], *node.kwargs.values()]
        lower, upper = given[0] if len(set(given[:2])) == 1 else None, None
    elif name in _BOUNDS:
        lower, upper = (
            None if bound is None else _argument(node, place, *bound)
            for place, bound in enumerate(_BOUNDS[name], 1)
        )
    else:
        return None
    if not isinstance(lower, int | float) or lower != 0:
        return None
    if upper is None or upper == math.inf:
        return "F.relu"
    return "F.relu6" if isinstance(upper, int | float) and upper == 6 else None


def _argument(node: fx.Node, place: int, name: str, default: float | None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


class _Gates:
    """Per value the one value that it is a pointwise function of, and whether it is bounded."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.known: dict[fx.Node, tuple[fx.Node, bool]] = {}
        for node in module.graph.nodes:
            self.known[node] = self._of(node, submodule(module, node))

    def _of(self, node: fx.Node, called: nn.Module | None) -> tuple[fx.Node, bool]:
        bounded = isinstance(called, _BOUNDED_MODULES) or call_name(node).rstrip("_") in _BOUNDED
        pointwise = bounded or (called is None and call_name(node) in _POINTWISE)
        inputs = [self.known[source] for source in _data(node)]
        sources = {source for source, _ in inputs}
        if not pointwise or len(sources) != 1:
            return node, False
        return sources.pop(), bounded or any(one for _, one in inputs)

    def source(self, node: fx.Node) -> fx.Node | None:
        """What the inputs of a node are pointwise functions of, if that is one value."""
        sources = {self.known[one][0] for one in _data(node)}
        return sources.pop() if len(sources) == 1 else None

    def gated_by_itself(self, node: fx.Node) -> bool:
        """Whether a node multiplies a value by a bounded function of the same value."""
        if call_name(node) not in _PRODUCTS or self.known[node][0] is node:
            return False
        factors = [self.known[one][1] for one in _data(node)]
        return len(factors) == 2 and factors[0] != factors[1]


def _data(node: fx.Node) -> list[fx.Node]:
    """Inputs of a node but for parameters and buffers."""
    return [one for one in node.all_input_nodes if one.op != "get_attr"]
