"""A constant on a residual stream into the bias of a layer that writes to the stream."""

from __future__ import annotations

from torch import Tensor, fx, nn

from ..gate import ConstantBias, smallest_form
from ..layers import affine, channel_dim, per_channel
from ..walk import passes_through, summands
from ..work import Plan, Refused, Work


def absorb(work: Work, node: fx.Node) -> Plan | None:
    """(W x + b) + c = W x + (b + c), through sums and dropouts in which c is the only way on.

    Another :class:`ConstantBias` on the same value takes the constant too, whatever its shape.
    """
    module = work.called(node)
    if type(module) is not ConstantBias:
        return None
    if work.hooked(node):
        raise Refused("it has hooks, which would not run any more; remove them first")
    shape, reasons = work.shape(node), list[str]()
    direct = node.all_input_nodes[0]
    found = _taker(work, direct, module.value, shape, reasons)
    if found is None:
        raise Refused(f"the constant stays as a module: {reasons[0]}")
    taker, taken, path = found
    sources = {s for step in path for s in step.all_input_nodes if s not in path}
    return Plan(
        name=str(node.target),
        detail=f"into {taker.target}",
        sources=tuple(s for s in sources if not work.known(s)),
        target=node,
        modules={str(taker.target): taken},
        becomes={node: direct},
    )


def _taker(
    work: Work, node: fx.Node, value: Tensor, shape: tuple[int, ...], reasons: list[str]
) -> tuple[fx.Node, nn.Module, list[fx.Node]] | None:
    """The layer that takes the constant, its new form and the nodes on the way to it."""
    if len(node.users) != 1:
        reasons.append(f"the value of {node.name!r} is used elsewhere")
        return None
    below: list[object] = []
    if passes_through(work, node):
        below = [node.args[0]]
    elif (operands := summands(node)) is not None:
        below = list(operands)
    for operand in below:
        if isinstance(operand, fx.Node) and not work.known(operand):
            if work.shape(operand) != shape:
                continue  # broadcast: the constant would be repeated along with it
            found = _taker(work, operand, value, shape, reasons)
            if found is not None:
                return found[0], found[1], [*found[2], node]
    if below:
        reasons.append(f"no summand of {node.name!r} is a layer that could take it")
        return None
    taken = _with_constant(work.called(node), value, shape)
    if taken is None:
        reasons.append(f"{node.name!r} has no bias that could take it")
    elif (reason := work.obstacle(node)) is not None:
        reasons.append(reason)
    else:
        return node, taken, [node]
    return None


def _with_constant(
    module: nn.Module | None, value: Tensor, shape: tuple[int, ...]
) -> nn.Module | None:
    if module is None:
        return None
    if type(module) is ConstantBias:
        return ConstantBias(smallest_form(module.value + value))
    dim = channel_dim(module, len(shape))
    offset = None if dim is None else per_channel(value, shape, dim)
    return None if offset is None else affine(module, None, offset)
