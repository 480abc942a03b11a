"""Sums of a convolution with what it reads, or with another one beside it, into one convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..convolutions import ZEROS, Geometry, as_conv, geometry_of, placed, regrouped
from ..layers import CONV, bias_of, scale_and_offset, weight_of
from ..walk import only_user, passes_through, summands
from ..work import Plan, Refused, Work


@dataclass(frozen=True)
class _Branch:
    """One summand as a convolution of ``entrance``; ``node`` is None for the entrance itself."""

    node: fx.Node | None
    entrance: fx.Node
    weight: Tensor  # [O, C / groups, *kernel]
    bias: Tensor | None
    geometry: Geometry
    groups: int


def residual(work: Work, node: fx.Node) -> Plan | None:
    """x + conv(x), conv_a(x) + conv_b(x): the kernels add up, each at its own taps.

    The identity is 1 on the tap at the output's own place, a 1x1 shortcut of stride s sits at tap
    index p; a batch norm or gate beside the convolution is a scaled identity. Exact under zero
    padding.
    """
    operands = summands(node)
    if operands is None or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    one, two = (_origin(work, operand) for operand in operands)  # type: ignore[arg-type]
    second = _is_conv(work, two) and (not _is_conv(work, one) or _reads(work, two, one))
    kept, other = (two, one) if second else (one, two)
    if not _is_conv(work, kept) or kept is other:
        return None
    a = _convolution(work, kept)
    beside_it = _is_conv(work, other) and other is not a.entrance
    b = _convolution(work, other) if beside_it else _scaled(work, other, a)
    if b is None or b.entrance is not a.entrance:
        return None
    if len({work.shape(n) for n in (kept, other, node)}) != 1:
        return None
    if b.weight.numel() > a.weight.numel():
        a, b = b, a
    for place in (a.node, b.node):
        if place is None:
            continue
        if work.hooked(place):
            raise Refused(f"{place.target!r} has hooks, which would not run any more")
        if _is_conv(work, place) and (reason := work.obstacle(place)):
            raise Refused(reason)
        if _last(work, place) is not node:
            raise Refused(f"the value of {place.name!r} is used elsewhere")
    assert a.node is not None
    beside = "its input" if b.node is None else str(b.node.target)
    whole = _sum(work.module.get_submodule(str(a.node.target)), a, b, beside)
    return Plan(
        name=str(a.node.target) if b.node is None else beside,
        detail=f"{beside} added to the kernel of {a.node.target}",
        sources=(a.entrance,),
        target=node,
        modules={str(a.node.target): whole},
        becomes={node: a.node},
        merges=weight_of(whole).numel() > a.weight.numel() + b.weight.numel(),
    )


def _origin(work: Work, node: fx.Node) -> fx.Node:
    """What a node hands on, seen through dropouts."""
    while passes_through(work, node):
        node = node.all_input_nodes[0]
    return node


def _last(work: Work, node: fx.Node) -> fx.Node | None:
    """The only reader of a value, seen through dropouts, or None."""
    user = only_user(node)
    while user is not None and passes_through(work, user):
        user = only_user(user)
    return user


def _reads(work: Work, node: fx.Node, entrance: fx.Node) -> bool:
    """Whether a convolution reads a value, which may be that of another convolution."""
    return _origin(work, node.all_input_nodes[0]) is entrance


def _is_conv(work: Work, node: fx.Node) -> bool:
    return type(work.called(node)) in CONV


def _convolution(work: Work, node: fx.Node) -> _Branch:
    conv = work.module.get_submodule(str(node.target))
    entrance = _origin(work, node.all_input_nodes[0])
    groups = int(conv.groups)  # type: ignore[arg-type]
    return _Branch(node, entrance, weight_of(conv), bias_of(conv), geometry_of(conv), groups)


def _scaled(work: Work, node: fx.Node, beside: _Branch) -> _Branch | None:
    """An identity, batch norm or gate as a depthwise 1x1 convolution."""
    dims = beside.weight.ndim - 2
    shape = work.shape(node)
    ones = (1,) * dims
    geometry = Geometry(ones, ones, ones, (0,) * dims, (0,) * dims)
    called = work.called(node)
    pair = None if called is None or node is beside.entrance else scale_and_offset(called)
    channels = shape[-dims - 1]
    if pair is None:
        weight = torch.ones_like(beside.weight.flatten()[:1]).expand(channels)
        found, entrance, bias = None, node, None
    else:
        if getattr(called, "channel_dim", 1) % len(shape) != len(shape) - dims - 1:
            return None
        weight, bias = pair
        found, entrance = node, _origin(work, node.all_input_nodes[0])
    return _Branch(found, entrance, weight.view(-1, 1, *ones), bias, geometry, channels)


def _sum(like: nn.Module, a: _Branch, b: _Branch, beside: str) -> nn.Module:
    """Both branches as one layer of the type of ``like``, which is the first of them."""
    first, second = a.geometry, b.geometry
    if first.stride != second.stride:
        raise Refused(f"{beside!r} beside it has another stride")
    modes = {g.mode for g in (first, second) if g.padded} or {ZEROS}
    if len(modes) > 1:
        raise Refused(f"{beside!r} beside it has another padding mode")
    before = tuple(max(pair) for pair in zip(first.before, second.before, strict=True))
    offsets = [tuple(b - p for b, p in zip(before, g.before, strict=True)) for g in (first, second)]
    steps = [_steps(g) for g in (first, second)]
    dilation = tuple(math.gcd(*values) or 1 for values in zip(*steps, *offsets, strict=True))
    reach = [
        max(o + r, p + q)
        for o, r, p, q in zip(offsets[0], first.reach, offsets[1], second.reach, strict=True)
    ]
    kernel = tuple(r // d + 1 for r, d in zip(reach, dilation, strict=True))
    larger = [max(pair) for pair in zip(first.kernel, second.kernel, strict=True)]
    if any(k > most for k, most in zip(kernel, larger, strict=True)):
        raise Refused(f"its taps and those of {beside!r} lie on no common grid of its size")
    rest = [b + a - r for b, a, r in zip(first.before, first.after, first.reach, strict=True)]
    after = tuple(t - b + r for t, b, r in zip(rest, before, reach, strict=True))
    whole = Geometry(kernel, first.stride, dilation, before, after, modes.pop())
    groups = math.gcd(a.groups, b.groups)
    weight = sum(
        placed(
            regrouped(branch.weight, branch.groups, groups),
            tuple(o // d for o, d in zip(offset, dilation, strict=True)),
            tuple(max(s // d, 1) for s, d in zip(step, dilation, strict=True)),
            kernel,
        )
        for branch, offset, step in zip((a, b), offsets, steps, strict=True)
    )
    assert isinstance(weight, Tensor)
    biases = [branch.bias for branch in (a, b) if branch.bias is not None]
    return as_conv(like, weight, sum(biases[1:], biases[0]) if biases else None, whole, groups)


def _steps(geometry: Geometry) -> tuple[int, ...]:
    """Distance of the taps along each axis; 0 for a single one."""
    pairs = zip(geometry.dilation, geometry.kernel, strict=True)
    return tuple(d if k > 1 else 0 for d, k in pairs)
