"""A gate, a constant or a batch norm into the layer that reads it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ...graph import BATCH_NORM
from ..convolutions import answer
from ..float64 import call
from ..gate import AffineGate, ConstantBias, smallest_form
from ..layers import (
    CONV,
    bias_of,
    per_channel,
    scale_and_offset,
    scaled_columns,
    spatial_dims,
    stored_weight,
    with_tensors,
)
from ..proof import Call
from ..walk import free_path, only_user, passes_through
from ..work import Plan, Refused, Work


def forward(work: Work, node: fx.Node) -> Plan | None:
    """W (a z + c) + b: W' = W diag(a), b' = b + W c, where the layer before could not take it.

    In front of a zero-padded convolution c gives a border map, not a bias: with the policy
    "biasmap" a constant behind the convolution, for the example's size only.
    """
    module = work.called(node)
    known = (AffineGate, ConstantBias, *BATCH_NORM)
    if module is None or type(module) not in known or work.hooked(node):
        return None
    reader = _reader(work, node)
    layer = work.called(reader) if reader is not None else None
    if reader is None or layer is None or type(layer) not in (nn.Linear, *CONV):
        return None
    shape = work.shape(node)
    dim = len(shape) - 1 if type(layer) is nn.Linear else len(shape) - 1 - spatial_dims(layer)
    pair = _pair(module, shape, dim)
    if pair is None:
        return None
    if reason := work.obstacle(reader):
        raise Refused(reason)
    scale, value = pair
    weight = stored_weight(layer) if scale is None else scaled_columns(layer, scale)
    added = _added(layer, value, shape, dim)
    source, bias = node.all_input_nodes[0], bias_of(layer)
    plan = Plan(str(node.target), f"into {reader.target}", (source,), reader)
    if added is not None:
        if bool(added.any()):
            bias = added if bias is None else bias + added
        plan.modules[str(reader.target)] = with_tensors(layer, weight=weight, bias=bias)
        plan.becomes[node] = source
        return plan
    if work.border != "biasmap":
        raise Refused("its constant meets zero padding: a border map, not a bias")
    image = smallest_form(_image(layer, value, shape, dim))
    taken = Call(str(reader.target), with_tensors(layer, weight=weight), source)
    plan.becomes[reader] = Call(free_path(work, "constant_bias"), ConstantBias(image), taken)
    plan.detail += f" and a constant of shape {list(image.shape)}, for this input size only"
    plan.rule, plan.sized = "biasmap", True
    return plan


def lighter_behind(work: Work, node: fx.Node, layer: nn.Module) -> Plan | None:
    """A gate or batch norm behind a Linear into the Linear that reads it, if that has less weights.

    Both ways are exact; of a network that consists of one large layer this one copies little.
    """
    reader = _reader(work, node)
    behind = work.called(reader) if reader is not None else None
    if reader is None or type(layer) is not nn.Linear or type(behind) is not nn.Linear:
        return None
    lighter = stored_weight(behind).numel() < stored_weight(layer).numel()
    return forward(work, node) if lighter and work.obstacle(reader) is None else None


def _reader(work: Work, node: fx.Node) -> fx.Node | None:
    """The one node that reads a value, seen through dropouts, or None."""
    reader = only_user(node)
    while reader is not None and passes_through(work, reader):
        reader = only_user(reader)
    return reader


def _pair(
    module: nn.Module, shape: tuple[int, ...], dim: int
) -> tuple[Tensor | None, Tensor] | None:
    """Scale [C] (None for 1) and what is added, aligned with the last dims of ``shape``.

    Returns:
        None where the channels lie on another dim than ``dim``.
    """
    if type(module) is ConstantBias:
        return (None, module.value) if module.value.ndim < len(shape) or dim == 0 else None
    pair = scale_and_offset(module)
    if pair is None or getattr(module, "channel_dim", 1) % len(shape) != dim:
        return None
    scale, offset = pair
    return scale, offset.view(-1, *[1] * (len(shape) - 1 - dim))


def _added(layer: nn.Module, value: Tensor, shape: tuple[int, ...], dim: int) -> Tensor | None:
    """What a constant input adds to the output, one number per channel; None for a map."""
    channels = per_channel(value, shape, dim)
    if channels is None:
        return None
    if type(layer) in CONV:
        return answer(layer, channels)
    with torch.no_grad():
        added: Tensor = call(with_tensors(layer, bias=None), [channels])
    return added


def _image(layer: nn.Module, value: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """The layer's answer to a constant input, less its bias; one sample unless ``dim`` is 0."""
    given = value.expand(1, *shape[1:]) if dim else value.expand(shape)
    with torch.no_grad():
        image: Tensor = call(with_tensors(layer, bias=None), [given.contiguous()])
    return image
