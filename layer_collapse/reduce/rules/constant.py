"""Branches that no longer depend on the input."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .. import passing
from ..channels import channels
from ..float64 import call, widened
from ..gate import AffineGate, ConstantBias, smallest_form
from ..holdings import attribute
from ..layers import past_borders
from ..proof import Call
from ..walk import factors, free_path, summands
from ..work import Plan, Refused, Work
from ..zeros import is_constant


@dataclass(frozen=True)
class Constant:
    """The value of a node that does not depend on the input.

    ``origins`` are the layers without weights that make it constant; a parameter of the model or a
    size has none. ``sized``: it may hold for the spatial size of the example inputs only.
    """

    value: object
    origins: frozenset[fx.Node] = frozenset()
    sized: bool = False


def constants(work: Work) -> dict[fx.Node, Constant]:
    """All constant values of a graph in its present form."""
    version, found = work.cache.get("constants", (-1, {}))
    if version != work.version:
        found = _propagate(work)
        work.cache["constants"] = (work.version, found)
    return dict(found)


def _propagate(work: Work) -> dict[fx.Node, Constant]:
    found: dict[fx.Node, Constant] = {}
    for node in work.module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if work.known(node):
            found[node] = Constant(node.meta["plain_value"], sized=True)
        elif node.op == "get_attr":
            found[node] = Constant(attribute(work.module, str(node.target)))  # as it is stored
        elif work.hooked(node):
            continue
        elif _starts(work, node):
            source = node.all_input_nodes[0]
            zeros = torch.zeros_like(_sample(work, source))
            found[node] = _evaluated(work, node, {source: zeros}, frozenset([node]), False)
        elif node.all_input_nodes and all(s in found for s in node.all_input_nodes):
            inputs = {s: widened(found[s].value) for s in node.all_input_nodes}
            origins = frozenset().union(*(found[s].origins for s in node.all_input_nodes))
            counts = [s for s in node.all_input_nodes if not isinstance(found[s].value, Tensor)]
            reshaped = passing.reshapes(node)
            if origins and counts and not reshaped:
                continue  # it computes with a size, perhaps that of the batch
            deciding = [s for s in node.all_input_nodes if not (reshaped and s in counts)]
            sized = any(found[s].sized for s in deciding)
            if origins:
                sized = sized or not _keeps_uniform(work, node)
                result = _evaluated(work, node, inputs, origins, sized)
                if _same(result.value, _evaluated(work, node, inputs, origins, sized).value):
                    found[node] = result  # else: random, as no constant is
            elif node.op == "call_function" or node.op == "call_method":
                found[node] = _evaluated(work, node, inputs, origins, sized)
    return found


def _keeps_uniform(work: Work, node: fx.Node) -> bool:
    """Whether no size decides what a node makes of uniform values; borders: see _meets_border."""
    return (
        passing.is_uniform(node, work.called(node))
        or bool(summands(node) or factors(node))
        or node.target is operator.getitem
    )


def _starts(work: Work, node: fx.Node) -> bool:
    module = work.called(node)
    return module is not None and len(node.all_input_nodes) == 1 and is_constant(module)


def _sample(work: Work, node: fx.Node) -> Tensor:
    device = next((p.device for p in work.module.parameters()), torch.device("cpu"))
    return torch.empty(work.shape(node), dtype=torch.float64, device=device)


def _evaluated(
    work: Work,
    node: fx.Node,
    inputs: dict[fx.Node, object],
    origins: frozenset[fx.Node],
    sized: bool,
) -> Constant:
    value = work.run([node], inputs)[node]
    if origins and isinstance(value, Tensor) and value.is_floating_point():
        reads = [inputs[s] for s in node.all_input_nodes]
        # Uniform inputs that give a map have met a border: it depends on where the border is.
        was = max((_varying(v) for v in reads if isinstance(v, Tensor)), default=0)
        sized = sized or _varying(value) > max(was, 1) or _meets_border(work, node, reads)
    return Constant(value, origins, sized)


def _meets_border(work: Work, node: fx.Node, reads: Sequence[object]) -> bool:
    """Whether a uniform image gives a map at a larger size, though not at the example's."""
    module, (given, *_) = work.called(node), reads
    if module is None or not isinstance(given, Tensor) or _varying(given) > 1:
        return False
    larger = past_borders(module, tuple(given.shape))
    if larger == tuple(given.shape):
        return False
    pixel = given.flatten(2)[:, :, 0].reshape(*given.shape[:2], *[1] * (given.ndim - 2))
    with torch.no_grad():
        return _varying(call(module, [pixel.expand(larger)])) > 1


def _varying(value: Tensor) -> int:
    """Number of dims along which a value changes."""
    return sum(size > 1 for size in smallest_form(value).shape) if value.is_floating_point() else 0


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b)


def cut_off(work: Work) -> fx.Node | None:
    """The layer that makes the whole output a constant, or None.

    Such a network is *cut*: for some layer there was no way around. It must not be called folded.
    """
    found = constants(work)
    output = next(n for n in work.module.graph.nodes if n.op == "output")
    given = [n for n in output.all_input_nodes if not work.known(n)]
    if not given or not all(n in found for n in given):
        return None
    origins = frozenset().union(*(found[n].origins for n in given))
    order = [n for n in work.module.graph.nodes if n in origins]
    return order[0] if order else None


def constant(work: Work, node: fx.Node) -> Plan | None:
    """x + c with c = the branch's constant: the branch leaves, a bias stays.

    c is computed in float64 through every layer behind the empty one: exact for any activation,
    border maps of zero-padded convolutions included. A constant factor becomes a gate.
    """
    found = constants(work)
    if node in found:
        return None
    branches = [n for n in node.all_input_nodes if n in found and found[n].origins]
    if not branches:
        return None
    branch = branches[0]
    known, place = found[branch], min(found[branch].origins)
    name = str(place.target)
    pair, product = summands(node), factors(node)
    operands = pair or product
    value = known.value
    if operands is None or not isinstance(value, Tensor) or len(set(operands)) != 2:
        raise Refused(f"{name!r} is constant, but {node.name!r} uses its value and cannot spare it")
    other = operands[1] if operands[0] is branch else operands[0]
    if not isinstance(other, fx.Node) or other in found:
        raise Refused(f"{name!r} is constant, but {node.name!r} adds no other value to it")
    if work.shape(other) != work.shape(node):
        raise Refused(f"{name!r} is constant, but {node.name!r} repeats the other value along it")
    if not bool(value.isfinite().all()):
        raise Refused(f"{name!r} is constant, but its branch ends in values that are not finite")
    value = smallest_form(value)
    # A layer without weights is constant whatever it reads, so the proof may feed it anything.
    sources = {other} | {n for origin in known.origins for n in origin.all_input_nodes}
    plan = Plan(name, f"branch of {branch.name}", tuple(sources), node)
    if pair and not bool(value.any()):
        plan.becomes[node] = other
        plan.detail += " is zero and leaves"
    elif pair:
        plan.becomes[node] = Call(free_path(work, "constant_bias"), ConstantBias(value), other)
        plan.detail += f" becomes a constant of shape {list(value.shape)}"
    else:
        plan.becomes[node] = Call(
            free_path(work, "constant_gate"), _factor(value, work, node), other
        )
        plan.detail += " becomes a factor"
    if known.sized or (pair and _varying(value) > 1):
        plan.rule = "biasmap"
        plan.detail += ", valid for this input size only"
        plan.sized = True
    return plan


def _factor(value: Tensor, work: Work, node: fx.Node) -> AffineGate:
    dims = [place for place, size in enumerate(value.shape) if size > 1]
    if len(dims) > 1:
        raise Refused(f"{node.name!r} multiplies by a constant that is not one per channel")
    shape, layout = work.shape(node), channels(work).layouts.get(node)
    if dims:
        dim = dims[0] - value.ndim
    elif layout is not None:  # one factor for all, and the other dims may change their size
        dim = layout.dim - len(shape)
    else:
        dim = 1 - len(shape) if len(shape) > 3 else -1
    scale = value.flatten().expand(shape[dim])
    return AffineGate(scale, torch.zeros_like(scale), dim)
