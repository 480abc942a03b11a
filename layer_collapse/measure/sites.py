"""Where the rectifiers of a model stand: what feeds each, and which dim its neurons lie on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ..graph import (
    TraceError,
    call_counts,
    carries_data,
    owner_path,
    reaches_output,
    rectifier_function,
    rectifier_nodes,
    submodule,
)
from ..sharding import count_over_shards, local
from .origins import Origin, Origins, call_name
from .rectifiers import Kind, module_kind, parse_function


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
    node: fx.Node, origin: Origin, module: fx.GraphModule, calls: Counter[str], tied: set[int]
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
    origins = Origins(module)
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
            base = f"{source}:{call_name(node).rstrip('_')}"
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
                f"comes from `{call_name(before)}`); pass example_inputs so that shapes are known, "
                f"or leave it out with ignore=({name!r},)"
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
                way_around=reaches_output(module, without=[node]),
            )
        )
    return sites


def empty_feeding(model: nn.Module, sites: Sequence[Site]) -> list[bool]:
    """Per site whether every weight of its feeding layer is zero, so that its input is constant."""
    weights = [
        None if site.feeding is None else model.get_submodule(site.feeding).weight for site in sites
    ]
    known = [weight for weight in weights if isinstance(weight, Tensor)]
    living = iter(count_over_shards(known, [int(local(w).detach().any()) for w in known]))
    return [isinstance(weight, Tensor) and next(living) == 0 for weight in weights]
