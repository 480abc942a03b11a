"""Part of a graph as a model of its own, to be timed as the user would run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from .holdings import attribute
from .proof import Becomes, Call


def extracted(
    module: fx.GraphModule,
    target: fx.Node,
    sources: list[fx.Node],
    known: Mapping[fx.Node, Any],
    take: Callable[[str, nn.Module], nn.Module],
    modules: Mapping[str, nn.Module] | None = None,
    becomes: Becomes | None = None,
) -> fx.GraphModule:
    """What computes ``target`` from ``sources``, as a model with one input per source.

    Args:
        known: values that become constants of the model (sizes).
        take: from path and module to the module that the model calls.
        modules: submodules to use instead of the graph's own, by path.
        becomes: nodes that do something else.
    """
    modules, becomes = modules or {}, becomes or {}
    graph, root = fx.Graph(), dict[str, Any]()
    made: dict[fx.Node, Any] = dict(known)
    for source in sources:
        made[source] = graph.placeholder(source.name)
    stack = [target]
    while stack:
        node = stack[-1]
        other = becomes.get(node)
        reads = other.entrance if isinstance(other, Call) else other
        needed = node.all_input_nodes if reads is None else [reads]
        missing = [n for n in needed if n not in made]
        if missing and node not in made:
            stack.extend(missing)
            continue
        stack.pop()
        if node in made:
            continue
        if isinstance(other, Call):
            value = made[other.entrance]
            for step in other.chain:
                root[step.path] = step.module
                value = graph.call_module(step.path, (value,))
            made[node] = value
        elif other is not None:
            made[node] = made[other]
        else:
            path = str(node.target)
            if node.op == "call_module":
                root[path] = take(path, modules.get(path) or attribute(module, path))
            elif node.op == "get_attr":
                root[path] = attribute(module, path)
            made[node] = graph.node_copy(node, lambda needed: made[needed])
    graph.output(made[target])
    return fx.GraphModule(root, graph).eval()
