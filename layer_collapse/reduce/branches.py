"""Residual sums: which summand is the stream, and which the branch computed from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from ..graph import carries_data, shape_of, submodule
from . import passing
from .layers import DROPOUT, channel_dim
from .walk import summands


@dataclass
class Branch:
    """A sum, which of its operands is the stream, and why the other one must stay."""

    sum: fx.Node
    place: int  # of the stream among its two operands
    layers: tuple[str, ...]
    dim: int = 0  # of the channels
    reason: str = ""

    @property
    def stream(self) -> fx.Node:
        return self.sum.args[self.place]  # type: ignore[return-value]

    @property
    def branch(self) -> fx.Node:
        return self.sum.args[1 - self.place]  # type: ignore[return-value]

    @property
    def name(self) -> str:
        return self.layers[-1] if self.layers else self.sum.name


def branches(graph: fx.GraphModule) -> Iterator[Branch]:
    """All sums of two values that depend on the input, in the order of execution."""
    for node in graph.graph.nodes:
        pair = [s for s in summands(node) or () if isinstance(s, fx.Node) and shape_of(s)]
        above = [_ancestors(s) for s in pair]
        if len(pair) != 2 or not all(any(n.op == "placeholder" for n in a) for a in above):
            continue
        roots = [_behind_identities(graph, s) for s in pair]
        place = next((i for i in (0, 1) if roots[i] in above[1 - i] - {pair[1 - i]}), None)
        if place is None or len({shape_of(n) for n in (*pair, node)}) != 1:
            own = sorted(above[0] ^ above[1])
            reason = "neither summand is the stream of the other; a shortcut with weights stays"
            yield Branch(node, 0, _modules(own), reason=reason)
            continue
        own = sorted(above[1 - place] - above[place])
        dim = _channel_dim(graph, pair[1 - place])
        found = Branch(node, place, _modules(own), dim or 0)
        hooked = [n for n in own if _hooked(submodule(graph, n))]
        if hooked:
            found.reason = f"{str(hooked[0].target)!r} has hooks, which would not run any more"
        elif len(found.branch.users) > 1:
            found.reason = f"the value of {found.branch.name!r} is used elsewhere"
        elif dim is None:
            found.reason = "the dim of its channels is not known"
        yield found


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that its value depends on, shapes aside."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found and carries_data(source):
                found.add(source)
                stack.append(source)
    return found


def _behind_identities(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    while type(submodule(graph, node)) in (nn.Identity, *DROPOUT):
        node = node.all_input_nodes[0]
    return node


def _modules(nodes: list[fx.Node]) -> tuple[str, ...]:
    return tuple(str(n.target) for n in nodes if n.op == "call_module")


def _hooked(module: nn.Module | None) -> bool:
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _channel_dim(graph: fx.GraphModule, node: fx.Node) -> int | None:
    """Dim of a value's channels, from the last layer that tells; None where none does."""
    shape, module = shape_of(node), submodule(graph, node)
    if shape is None or not node.all_input_nodes:
        return None
    if module is not None and (own := channel_dim(module, len(shape))) is not None:
        return own
    source = next((s for s in node.all_input_nodes if shape_of(s) == shape), None)
    source = source or next(s for s in node.all_input_nodes)
    dim, before = _channel_dim(graph, source), shape_of(source)
    if dim is None or before is None:
        return None
    moved = passing.moved(node, module, dim, before, shape)
    if moved is not None:
        return moved[0] if moved[1] == 1 else None
    return dim if before == shape else None  # a scale per channel, stochastic depth
