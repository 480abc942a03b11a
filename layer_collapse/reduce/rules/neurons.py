"""Neurons that do not depend on the input: their rows and the columns that read them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...graph import BATCH_NORM, rectifier_function
from ..float64 import call, wide
from ..gate import AffineGate, smallest_form
from ..layers import (
    CONV,
    ELEMENTWISE,
    bias_of,
    channel_dim,
    constant_rows,
    per_channel,
    stored_weight,
    with_tensors,
    without_channels,
    without_columns,
)
from ..walk import only_user
from ..work import Plan, Refused, Work

#: Pools by the number of spatial dims: on a value of another rank they would mix channels.
_POOLS = {
    1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}
_POOL_FUNCTIONS = (F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d)
_FLATTENS = ("view", "reshape", "flatten")


@dataclass
class _Way:
    """From a layer to the one that reads it: per-channel nodes, and whether one flattens."""

    reader: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    narrowed: list[fx.Node] = field(default_factory=list)  # with one entry per channel of their own


def neurons(work: Work, node: fx.Node) -> Plan | None:
    """A row of zeros makes neuron i the constant c_i = act(b_i): W2 x = W2[:, live] x[live] + W2 c.

    The row leaves with column i of the reader; what c_i sends goes into the reader's bias. In front
    of zero padding only neurons with c_i = 0 can leave. A neuron whose column is zero leaves too.
    """
    layer = work.called(node)
    if layer is None or type(layer) not in (nn.Linear, *CONV) or getattr(layer, "groups", 1) != 1:
        return None
    way = _way(work, node)
    reader = None if way is None else work.called(way.reader)
    if way is None or reader is None:
        return None
    sent, uniform = _sent(work, node, way)
    constant = constant_rows(layer)
    unread = _unread(reader, len(constant))
    if not bool((constant | unread).any()) or bool(constant.all()) or bool(unread.all()):
        return None  # all: the constant rule's case
    dead = (constant & uniform) | unread
    extra = _added(reader, sent, dead & ~unread)
    if extra is None:  # a border map: only neurons that send nothing leave
        dead &= unread | ~sent.flatten(1).any(dim=1)
    if bool(dead.all()):  # the reader's weights are then zero, which the constant rule sees
        dead[unread.nonzero()[0]] = False
    if not bool(dead.any()):
        raise Refused(f"{int(constant.sum())} constant neurons meet a border of zero padding")
    for place in (node, *way.narrowed, way.reader):
        if reason := work.obstacle(place):
            raise Refused(f"{int(dead.sum())} constant neurons stay: {reason}")
    keep = ~dead
    modules: dict[str, nn.Module] = {}
    for place in (node, *way.narrowed):
        narrow = without_channels(work.module.get_submodule(str(place.target)), keep)
        if narrow is None:
            return None
        modules[str(place.target)] = narrow
    columns = keep.repeat_interleave(stored_weight(reader).shape[1] // len(keep))
    bias = extra if extra is not None and bool(extra.any()) else None
    modules[str(way.reader.target)] = without_columns(reader, columns, bias)
    return Plan(
        name=str(node.target),
        detail=f"{int(dead.sum())} of {len(dead)} neurons leave, read by {way.reader.target}",
        sources=(node.all_input_nodes[0],),
        target=way.reader,
        modules=modules,
    )


def _way(work: Work, node: fx.Node) -> _Way | None:
    shape = work.shape(node)
    layer = work.called(node)
    dim = None if layer is None else channel_dim(layer, len(shape))
    way, flat, place = _Way(node), False, only_user(node)
    while place is not None and dim is not None:
        module = work.called(place)
        if work.hooked(place):
            return None
        last = dim == len(work.shape(place.all_input_nodes[0])) - 1
        if type(module) is nn.Linear and last:
            way.reader = place
            return way
        if type(module) in CONV and module.groups == 1 and dim == 1 and not flat:  # type: ignore[union-attr]
            way.reader = place
            return way
        if _has_channels(module, dim, len(work.shape(place))) and not flat:
            way.narrowed.append(place)
        elif dim == 1 and not flat and _flattens(work, place, module):
            flat = len(work.shape(place.all_input_nodes[0])) > 2
        elif not (_leaves_channels(place, module) or (dim == 1 and _pools(work, place, module))):
            return None
        way.nodes.append(place)
        place = only_user(place)
    return None


def _has_channels(module: nn.Module | None, dim: int, ndim: int) -> bool:
    """Whether a module has one entry per channel, on the channels' own dim."""
    if type(module) is nn.PReLU:
        return dim == 1 and module.weight.numel() > 1
    if type(module) in CONV:
        depthwise = module.groups == module.in_channels == module.out_channels  # type: ignore[union-attr]
        return dim == 1 and bool(depthwise)
    return type(module) in (*BATCH_NORM, AffineGate) and channel_dim(module, ndim) == dim  # type: ignore[arg-type]


def _leaves_channels(place: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node works on each element by itself."""
    if type(module) in ELEMENTWISE:
        return True
    if type(module) is nn.PReLU:
        return module.weight.numel() == 1
    function = rectifier_function(place)
    return function is not None and len(place.all_input_nodes) == 1


def _pools(work: Work, place: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node pools each channel of a batch of images by itself."""
    spatial = len(work.shape(place.all_input_nodes[0])) - 2
    if place.op == "call_function":
        options = place.kwargs.get("return_indices", False)
        return spatial == 2 and place.target in _POOL_FUNCTIONS and not options
    return type(module) in _POOLS.get(spatial, ()) and not getattr(module, "return_indices", False)


def _flattens(work: Work, place: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node turns [N, C, ...] into [N, C * ...] in memory order."""
    known = type(module) is nn.Flatten or place.target is torch.flatten
    known = known or (place.op == "call_method" and place.target in _FLATTENS)
    if not known:
        return False
    before, after = work.shape(place.all_input_nodes[0]), work.shape(place)
    return len(before) >= 2 and after == (before[0], torch.Size(before[1:]).numel())


def _unread(reader: nn.Module, channels: int) -> Tensor:
    """[C] bool: channels whose columns in the reader (blocks of them behind a flatten) are zero."""
    columns = stored_weight(reader).any(dim=0).flatten()  # per column (and tap of its kernel)
    return ~columns.reshape(channels, -1).any(dim=1)


def _sent(work: Work, node: fx.Node, way: _Way) -> tuple[Tensor, Tensor]:
    """What each channel gives to the reader if its row is zero.

    Returns:
        [C, ...]: the constant of each channel, as the reader sees it (a map in front of a
        convolution, a block of columns in front of a Linear), and [C] bool: whether it is finite
        and no border has made it depend on the position (and so on the size of the input).
    """
    layer = work.module.get_submodule(str(node.target))
    shape = work.shape(node)
    weight = stored_weight(layer)
    bias = bias_of(layer)
    bias = wide(weight.new_zeros(len(weight))) if bias is None else bias
    dim = channel_dim(layer, len(shape))
    view = [1] * len(shape)
    view[dim or 0] = len(bias)
    start = bias.view(view).expand(shape)
    last = way.nodes[-1] if way.nodes else node
    values = work.run([last], {node: start})
    uniform = torch.ones(len(bias), dtype=torch.bool, device=bias.device)
    for place in (n for n in way.nodes if len(work.shape(n)) == len(shape)):
        channels = values[place].movedim(dim or 0, 0).flatten(1)
        limit = 1e-12 * channels.abs().amax(dim=1, keepdim=True)
        uniform &= ((channels - channels[:, :1]).abs() <= limit).all(dim=1)  # False for NaN
    value = values[last]
    if type(work.called(way.reader)) is nn.Linear:
        return value.reshape(-1, value.shape[-1])[0].view(len(bias), -1), uniform
    return value[0], uniform


def _added(reader: nn.Module, sent: Tensor, dead: Tensor) -> Tensor | None:
    """[C2]: what the dead neurons add to the reader's bias; None where that is a border map."""
    only = torch.where(dead.view(-1, *[1] * (sent.ndim - 1)), sent, 0.0)
    given = only.flatten() if type(reader) is nn.Linear else only
    with torch.no_grad():
        image: Tensor = call(with_tensors(reader, bias=None), [given.unsqueeze(0)])
    return per_channel(smallest_form(image), tuple(image.shape), 1)
