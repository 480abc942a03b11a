"""Two linear layers in a row into one."""

from __future__ import annotations

from torch import fx, nn

from ..float64 import product
from ..layers import bias_of, stored_weight, with_tensors
from ..walk import above, read_elsewhere
from ..work import Plan, Refused, Work


def linear(work: Work, node: fx.Node) -> Plan | None:
    """W = W2 W1, b = W2 b1 + b2. The second layer's name stays.

    A transformer's MLP d -> 4d -> d becomes d -> d: 8 d^2 weights become d^2.
    """
    second = work.called(node)
    if not isinstance(second, nn.Linear):
        return None
    source, between = above(work, node)
    first = work.called(source)
    if not isinstance(first, nn.Linear):
        return None
    for place, layer in ((source, first), (node, second)):
        if reason := work.obstacle(place):
            raise Refused(reason)
        if type(layer) is not nn.Linear:
            raise Refused(f"{place.target!r} is a {type(layer).__name__}, not a plain Linear")
    if busy := read_elsewhere([source, *between]):
        raise Refused(f"the value of {busy.name!r} is used elsewhere")
    if work.dtypes[f"{source.target}.weight"] != work.dtypes[f"{node.target}.weight"]:
        raise Refused(f"{source.target!r} and {node.target!r} are stored in different dtypes")
    outer, inner, bias = stored_weight(second), bias_of(first), bias_of(second)
    if inner is not None:
        moved = product(outer, inner[:, None])[:, 0]
        bias = moved if bias is None else moved + bias
    merged = with_tensors(second, weight=product(outer, stored_weight(first)), bias=bias)
    merged.in_features = first.in_features  # type: ignore[assignment]
    sizes = f"{first.in_features} -> {first.out_features} -> {second.out_features}"
    before = outer.numel() + stored_weight(first).numel()
    after, entrance = stored_weight(merged).numel(), source.all_input_nodes[0]
    return Plan(
        name=str(source.target),
        detail=f"into {node.target}: {sizes}, {before} weights become {after}",
        sources=(entrance,),
        target=node,
        modules={str(node.target): merged},
        becomes={(between or [source])[0]: entrance},
        merges=True,
    )


def merged_size(work: Work, node: fx.Node) -> int:
    """Weights of what a Linear and the one that it reads would become; 0 for any other node.

    Chains merge from where this is smallest: 25088 -> 4096 -> 4096 -> 1000 never is 25088 -> 4096.
    """
    second = work.called(node)
    first = work.called(above(work, node)[0]) if type(second) is nn.Linear else None
    if type(second) is not nn.Linear or type(first) is not nn.Linear:
        return 0
    return second.out_features * first.in_features
