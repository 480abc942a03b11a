"""A gate into the layer that feeds it, or into a smaller one that reads it."""

from __future__ import annotations

import torch
from torch import fx

from ..gate import AffineGate
from ..layers import affine, channel_dim
from ..walk import above, read_elsewhere
from ..work import Plan, Refused, Work
from .forward import lighter_behind


def gate(work: Work, node: fx.Node) -> Plan | None:
    """y = a z + c with z = W x + b: W' = diag(a) W, b' = a b + c. Identities vanish anywhere."""
    module = work.called(node)
    if type(module) is not AffineGate:
        return None
    if work.hooked(node):
        raise Refused("the gate has hooks, which would not run any more; remove them first")
    direct = node.all_input_nodes[0]
    name = str(node.target)
    if module.is_identity():
        return Plan(name, "identity", (direct,), node, becomes={node: direct})
    source, between = above(work, node)
    layer = work.called(source)
    ndim = len(work.shape(node))
    if layer is None or getattr(layer, "weight", getattr(layer, "scale", None)) is None:
        raise Refused(f"its input {source.name!r} is not a layer with weights")
    if reason := work.obstacle(source):
        raise Refused(reason)
    if busy := read_elsewhere([source, *between]):
        raise Refused(f"the value of {busy.name!r} is used elsewhere")
    off = int(torch.count_nonzero((module.scale == 0) & (module.offset == 0)))
    neurons = f"{off} of {len(module.scale)} neurons off"
    if (plan := lighter_behind(work, node, layer)) is not None:
        plan.detail += f", {neurons}"
        return plan
    scale = None if bool((module.scale == 1).all()) else module.scale
    fits = channel_dim(layer, ndim) == module.channel_dim % ndim
    folded = affine(layer, scale, module.offset) if fits else None
    if folded is None:
        raise Refused(
            f"{source.target!r} ({type(layer).__name__}) has no rows along dim "
            f"{module.channel_dim} that could take it"
        )
    return Plan(
        name=name,
        detail=f"into {source.target}, {neurons}",
        sources=(source.all_input_nodes[0],),
        target=node,
        modules={str(source.target): folded},
        becomes={node: source},
    )
