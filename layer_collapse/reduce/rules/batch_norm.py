"""BatchNorm into the layer in front of it, or into a smaller one behind it."""

from __future__ import annotations

from torch import fx

from ...graph import BATCH_NORM, WEIGHTED
from ..layers import affine, channel_dim, scale_and_offset
from ..walk import above, read_elsewhere
from ..work import Plan, Refused, Work
from .forward import lighter_behind


def batch_norm(work: Work, node: fx.Node) -> Plan | None:
    """y = g (x - mean) / sqrt(var + eps) + beta, with the module's own eps and statistics.

    Per channel an affine map, so W' = s W and b' = s (b - mean) + beta with
    s = g / sqrt(var + eps).
    """
    norm = work.called(node)
    if not isinstance(norm, BATCH_NORM):
        return None
    source, between = above(work, node)
    layer = work.called(source)
    if not isinstance(layer, WEIGHTED):
        raise Refused(f"it reads {source.name!r}, which is not a linear or convolutional layer")
    if type(norm) not in BATCH_NORM:
        raise Refused(f"{type(norm).__name__} may compute something of its own")
    if work.hooked(node):
        raise Refused("it has hooks, which would not run any more; remove them first")
    pair = scale_and_offset(norm)
    if pair is None:
        raise Refused("it has no running statistics: it normalises each batch by itself")
    if reason := work.obstacle(source):
        raise Refused(reason)
    if busy := read_elsewhere([source, *between]):
        raise Refused(f"the value of {busy.name!r} is used elsewhere")
    shape = work.shape(source)
    if channel_dim(layer, len(shape)) != 1:
        raise Refused(f"its channels are not those of {source.target!r} (shape {list(shape)})")
    if (plan := lighter_behind(work, node, layer)) is not None:
        return plan
    folded = affine(layer, *pair)
    if folded is None:
        raise Refused(f"{source.target!r} is a {type(layer).__name__}, which cannot take it")
    return Plan(
        name=str(node.target),
        detail=f"into {source.target}",
        sources=(source.all_input_nodes[0],),
        target=node,
        modules={str(source.target): folded},
        becomes={node: source},
    )
