"""Which rectifiers can leave together: those of a branch whose last layer becomes a constant.

A rectifier with a way around it need not leave alone. In ``x + fc2(act(fc1(x)))`` the output of
``fc2`` can be a constant, and ``act`` is gone; with the branch of an inverted residual go two
rectifiers at once. What has no way around it (a plain chain, a rectifier behind a residual sum)
cannot be constant, or the network is cut: it leaves by becoming linear, see
:mod:`layer_collapse.removal.ways`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx, nn

from ..graph import BATCH_NORM, WEIGHTED, call_counts, live_nodes
from ..measure.sites import Site

__all__ = ["Unit", "find_units", "swappable"]


@dataclass(frozen=True)
class Unit:
    """A branch that can leave.

    Attributes:
        rectifiers: names of those that nothing depends on when the exit is constant.
        feeding: paths of the layers that feed them and nothing else.
        exit: path of the last layer with a bias of its own: linear, convolution, batch or layer
            norm. With its weights at zero its output is that bias.
    """

    rectifiers: tuple[str, ...]
    feeding: tuple[str, ...]
    exit: str


def find_units(
    graph: fx.GraphModule, sites: Sequence[Site], cut: Collection[str] = ()
) -> list[Unit]:
    """Every branch that may be cut although the exits ``cut`` are constant already.

    The output still depends on every input with all those exits *and* the new one taken out.

    Args:
        graph: of :func:`layer_collapse.graph.trace`.
        sites: of the same graph.

    Returns:
        In the order of execution of their first rectifiers; of layers at which the same rectifiers
        would leave, the last one is the exit.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    gone = {node for node in nodes.values() if node.op == "call_module" and node.target in cut}
    before = live_nodes(graph, gone)
    inputs = {node for node in before if node.op == "placeholder"}
    exits: dict[tuple[str, ...], str] = {}
    for node in _possible_exits(graph):
        if node not in before:
            continue
        after = live_nodes(graph, gone | {node})
        leaving = tuple(s.name for s in sites if nodes[s.node] in before - after)
        if leaving and inputs and inputs <= after:
            exits[leaving] = str(node.target)
    order = {site.name: number for number, site in enumerate(sites)}
    return [
        Unit(names, _feeding(sites, names), exits[names])
        for names in sorted(exits, key=lambda names: order[names[0]])
    ]


def _possible_exits(graph: fx.GraphModule) -> list[fx.Node]:
    calls = call_counts(graph)
    owners = Counter(
        id(p) for m in graph.modules() for p in m.parameters(recurse=False) if p is not None
    )
    found = []
    for node in graph.graph.nodes:
        if node.op != "call_module" or calls[str(node.target)] != 1:
            continue
        module = graph.get_submodule(str(node.target))
        if type(module) not in (*WEIGHTED, *BATCH_NORM, nn.LayerNorm):
            continue
        own = [module._parameters.get("weight"), module._parameters.get("bias")]
        if all(p is not None and owners[id(p)] == 1 for p in own):
            found.append(node)
    return found


def _feeding(sites: Sequence[Site], names: tuple[str, ...]) -> tuple[str, ...]:
    own = [s.feeding for s in sites if s.name in names and s.candidate and s.feeding is not None]
    return tuple(dict.fromkeys(own))


def swappable(sites: Sequence[Site]) -> dict[str, str]:
    """Path by name of the rectifiers that another module can replace in place.

    Those are modules with one call: a functional rectifier has no place of its own, and a module
    with several calls stands for several rectifiers.
    """
    calls = Counter((site.source, site.functional) for site in sites)
    return {
        site.name: site.source
        for site in sites
        if not site.functional and calls[site.source, False] == 1
    }
