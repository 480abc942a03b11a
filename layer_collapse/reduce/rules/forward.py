"""A gate or a constant into the layer that reads it, where the layer before it could not."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..float64 import call
from ..gate import AffineGate, ConstantBias, smallest_form
from ..layers import (
    CONV,
    bias_of,
    per_channel,
    scaled_columns,
    spatial_dims,
    stored_weight,
    with_tensors,
)
from ..walk import only_user, passes_through, read_elsewhere
from ..work import Plan, Refused, Work


def forward(work: Work, node: fx.Node) -> Plan | None:
    """W (a z + c) + b: W' = W diag(a), b' = b + W c.

    In front of a zero-padded convolution c gives a border map, not a bias: refused unless c = 0.
    """
    module = work.called(node)
    if type(module) not in (AffineGate, ConstantBias) or work.hooked(node):
        return None
    chain, reader = [node], only_user(node)
    while reader is not None and passes_through(work, reader):
        chain.append(reader)
        reader = only_user(reader)
    layer = work.called(reader) if reader is not None else None
    if reader is None or layer is None or type(layer) not in (nn.Linear, *CONV):
        return None
    shape = work.shape(node)
    dim = len(shape) - 1 if type(layer) is nn.Linear else len(shape) - 1 - spatial_dims(layer)
    scale, offset = _pair(module, shape, dim)
    if offset is None:
        return None
    if reason := work.obstacle(reader):
        raise Refused(reason)
    assert read_elsewhere(chain) is None  # only_user has led here
    bias = bias_of(layer)
    if bool(offset.any()):
        moved = _through(layer, offset, shape, dim)
        bias = moved if bias is None else bias + moved
    weight = stored_weight(layer) if scale is None else scaled_columns(layer, scale)
    source = node.all_input_nodes[0]
    return Plan(
        name=str(node.target),
        detail=f"into {reader.target}",
        sources=(source,),
        target=reader,
        modules={str(reader.target): with_tensors(layer, weight=weight, bias=bias)},
        becomes={node: source},
    )


def _pair(
    module: nn.Module | None, shape: tuple[int, ...], dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and offset along ``dim``; the offset is None where they lie on another dim."""
    if type(module) is AffineGate:
        if module.channel_dim % len(shape) != dim:
            return None, None
        return module.scale, module.offset
    assert isinstance(module, ConstantBias)
    return None, per_channel(module.value, shape, dim)


def _through(layer: nn.Module, offset: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """What a constant input adds to the output, one number per channel."""
    view = [1] * len(shape)
    view[dim] = shape[dim]
    given = offset.view(view).expand(1, *shape[1:]) if dim else offset.view(view).expand(shape)
    with torch.no_grad():
        image = call(with_tensors(layer, bias=None), [given.contiguous()])
    channels = image.ndim - 1 if type(layer) is nn.Linear else dim
    moved = per_channel(smallest_form(image), tuple(image.shape), channels)
    if moved is None:
        raise Refused("its constant meets zero padding: a border map, not a bias")
    return moved
