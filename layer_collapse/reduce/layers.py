"""Arithmetic on the weights of single layers: in float64, whatever dtype they are stored in."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ..graph import BATCH_NORM, WEIGHTED
from .float64 import blocks, by_rows, parts, wide
from .gate import AffineGate, ConstantBias

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
#: Modules that map every element by itself, whatever its place.
ELEMENTWISE = (
    nn.Identity,
    *DROPOUT,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
)


def stored_weight(module: nn.Module) -> Tensor:
    """The weight of a layer that has one, as it is stored: for its shape, slices and zeros."""
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer that has one, in float64."""
    return wide(stored_weight(module))


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a layer in float64, or None."""
    return wide(module.bias) if isinstance(module.bias, Tensor) else None


def spatial_dims(module: nn.Module) -> int:
    """1, 2 or 3 for a (transposed) convolution, 0 for any other module."""
    for number, kinds in enumerate(zip(CONV, CONV_TRANSPOSE, strict=True), start=1):
        if type(module) in kinds:
            return number
    return 0


def channel_dim(module: nn.Module, ndim: int) -> int | None:
    """Dim of the channels in a value of rank ``ndim`` that a layer gives; None where unknown."""
    if type(module) in (nn.Linear, nn.LayerNorm):
        return ndim - 1
    if type(module) in BATCH_NORM:
        return 1 if ndim >= 2 else None
    if type(module) is AffineGate:
        return module.channel_dim % ndim
    if spatial_dims(module):
        return 1 if ndim == spatial_dims(module) + 2 else None  # an image without batch has 0
    return None


def past_borders(module: nn.Module | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape like ``shape`` in which a convolution or pool meets its border and also does not.

    A small image may lie wholly in the border, where every output is alike. Any other module is
    content with the shape as it is.
    """
    kernel = getattr(module, "kernel_size", None)
    if kernel is None:
        return shape
    dilation, padding, stride = (
        getattr(module, name, default)
        for name, default in (("dilation", 1), ("padding", 0), ("stride", 1))
    )
    k, d, p, s = (
        max(a) if isinstance(a, tuple) else a if isinstance(a, int) else 0
        for a in (kernel, dilation, padding, stride)
    )
    return (*shape[:2], *[1 + 2 * (k * d + p + s)] * (len(shape) - 2))


def per_channel(value: Tensor, shape: tuple[int, ...], dim: int) -> Tensor | None:
    """``value`` (aligned with the last dims of ``shape``) as one number per channel, or None.

    Returns:
        [shape[dim]] if the value changes along ``dim`` alone.
    """
    if value.ndim > len(shape):
        return None
    aligned = value.reshape((1,) * (len(shape) - value.ndim) + tuple(value.shape))
    if any(size != 1 for place, size in enumerate(aligned.shape) if place != dim):
        return None
    return aligned.flatten().expand(shape[dim]).clone()


def with_tensors(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """A copy of a layer with some parameters or buffers replaced; strides and flags are kept.

    A parameter that was None (a missing bias) becomes one. A weight that was channels_last stays
    so. What is not replaced stays in the dtype it is stored in.
    """
    new = copy.copy(module)
    new._parameters = dict(module._parameters)
    new._buffers = dict(module._buffers)
    trainable = any(p.requires_grad for p in module.parameters(recurse=False))
    for name, tensor in tensors.items():
        old = getattr(module, name)
        if tensor is not None and old is not None:
            tensor = _as_laid_out(old, tensor)
        if name in module._buffers:
            new._buffers[name] = tensor
        elif tensor is None:
            new._parameters[name] = None
        else:
            keeps = old.requires_grad if old is not None else trainable
            new._parameters[name] = nn.Parameter(tensor, requires_grad=keeps)
    return new


def _as_laid_out(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach().contiguous()
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        same = old.ndim == ndim == new.ndim and not old.is_contiguous()
        if same and old.is_contiguous(memory_format=layout):
            return new.contiguous(memory_format=layout)
    return new


def affine(module: nn.Module, scale: Tensor | None, offset: Tensor | None) -> nn.Module | None:
    """``x -> scale * module(x) + offset`` per channel as a layer of the same type.

    Linear and convolution: W' = diag(scale) W, b' = scale b + offset; normalisations and gates
    likewise. ``scale`` and ``offset`` are [C]; None stands for 1 and 0.

    Returns:
        None where the layer has no weights that could take it.
    """
    if type(module) is AffineGate:
        new_scale = module.scale if scale is None else module.scale * scale
        return with_tensors(module, scale=new_scale, offset=_moved(module.offset, scale, offset))
    if not isinstance(module, (*WEIGHTED, *BATCH_NORM, nn.LayerNorm)):
        return None
    if module.weight is None or (type(module) is nn.LayerNorm and stored_weight(module).ndim != 1):
        return None
    bias = bias_of(module)
    tensors: dict[str, Tensor | None] = {}
    if scale is not None:
        tensors["weight"] = _scaled_rows(module, scale)
    if bias is not None or offset is not None:
        tensors["bias"] = _moved(bias, scale, offset)
    return with_tensors(module, **tensors)


def _moved(bias: Tensor | None, scale: Tensor | None, offset: Tensor | None) -> Tensor | None:
    if bias is None:
        return offset
    moved = bias if scale is None else bias * scale
    return moved if offset is None else moved + offset


def scale_and_offset(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """A batch norm or a gate as ``scale x + offset`` per channel, each [C].

    Returns:
        None for any other module, and for a norm without running statistics.
    """
    if type(norm) is AffineGate:
        return norm.scale, norm.offset
    if type(norm) not in BATCH_NORM or norm.running_mean is None or norm.running_var is None:
        return None
    scale = torch.rsqrt(norm.running_var + norm.eps)  # type: ignore[operator]
    if norm.weight is not None:
        scale = scale * weight_of(norm)
    offset = -norm.running_mean * scale  # type: ignore[operator]
    shift = bias_of(norm)
    return scale, offset if shift is None else offset + shift


def _scaled_rows(module: nn.Module, scale: Tensor) -> Tensor:
    weight = stored_weight(module)
    if isinstance(module, CONV_TRANSPOSE):  # [in, out / groups, *kernel], groups along in
        groups, kernel = module.groups, weight.shape[2:]
        split = wide(weight).reshape(groups, -1, weight.shape[1], *kernel)
        factors = scale.reshape(groups, 1, -1, *[1] * len(kernel))
        return (split * factors).reshape(weight.shape)
    column = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return by_rows(weight, lambda some, rows: some * column[rows])


def scaled_columns(module: nn.Module, scale: Tensor) -> Tensor:
    """Weight of a Linear or Conv that reads ``scale * x``: W diag(scale), per group."""
    weight = stored_weight(module)
    row = _per_row(scale, module)
    after = [1] * (weight.ndim - 2)
    return by_rows(weight, lambda some, rows: some * row[rows].view(*some.shape[:2], *after))


def _per_row(columns: Tensor, module: nn.Module) -> Tensor:
    """[out, in / groups]: what each row of a Linear or Conv reads of one value per column [in]."""
    rows, groups = len(stored_weight(module)), int(getattr(module, "groups", 1))
    return columns.reshape(groups, 1, -1).expand(groups, rows // groups, -1).flatten(0, 1)


def without_channels(module: nn.Module, keep: Tensor, ndim: int) -> nn.Module:
    """A normalisation, gate, PReLU or constant for the channels ``keep`` ([C] bool) alone.

    Args:
        ndim: how many dims a value has from the channels on, to find them in a ConstantBias.
    """
    if type(module) is ConstantBias:
        dim = module.value.ndim - ndim
        if dim < 0 or module.value.shape[dim] == 1:
            return module  # the same for all channels
        places = keep.nonzero().flatten().to(module.value.device)
        return with_tensors(module, value=module.value.index_select(dim, places))
    if type(module) is nn.PReLU and module.weight.numel() == 1:
        return module  # one slope for all channels
    names = ("weight", "bias", "running_mean", "running_var", "scale", "offset")
    own = {name: getattr(module, name, None) for name in names}
    new = with_tensors(module, **{name: t[keep] for name, t in own.items() if t is not None})
    if type(module) in BATCH_NORM:
        new.num_features = int(keep.sum())  # type: ignore[assignment]
    if type(module) is nn.PReLU:
        new.num_parameters = int(keep.sum())  # type: ignore[assignment]
    return new


def selected(
    module: nn.Module, rows: Tensor, columns: Tensor, extra_bias: Tensor | None
) -> nn.Module:
    """A Linear or Conv with some of its rows and columns, and with a bias added.

    Args:
        rows: [out] bool, those that stay; as many in every group, or none.
        columns: [in] bool, likewise; none in the groups that lose their rows.
        extra_bias: [out] or None.
    """
    groups = int(getattr(module, "groups", 1))
    bias = _moved(bias_of(module), None, extra_bias)
    weight = stored_weight(module)
    given, read = rows.view(groups, -1), columns.view(groups, -1)
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    live = [g for g in range(groups) if bool(given[g].any())]
    rows_of = [given[g].nonzero().flatten().to(weight.device) for g in live]
    columns_of = [read[g].nonzero().flatten().to(weight.device) for g in live]
    made = weight.new_empty(sum(map(len, rows_of)), int(read.sum(1).max()), *weight.shape[2:])
    start = 0
    for g, some, reads in zip(live, rows_of, columns_of, strict=True):
        for part in parts(some, blocks[g][0].numel()):  # one copy, and no second on the way to it
            made[start : start + len(part)] = blocks[g][part].index_select(1, reads)
            start += len(part)
    weight = made
    new = with_tensors(module, weight=weight, bias=None if bias is None else bias[rows])
    sizes = {"in": int(columns.sum()), "out": int(rows.sum())}
    kind = "features" if type(module) is nn.Linear else "channels"
    for side, size in sizes.items():
        setattr(new, f"{side}_{kind}", size)
    if kind == "channels":
        new.groups = len(live)  # type: ignore[assignment]
    return new


def constant_rows(module: nn.Module, live: Tensor | None = None) -> Tensor:
    """[C] bool: channels of a Linear or Conv whose weights are all zero.

    Args:
        live: [in] bool, columns that count; by default all of them.
    """
    weight = stored_weight(module)
    found = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    for rows in blocks(weight):  # torch reduces through bools, of a large weight too many at once
        used = weight[rows].flatten(2).any(dim=2) if weight.ndim > 2 else weight[rows] != 0
        if live is not None:
            used = used & _per_row(live.to(weight.device), module)[rows]
        found[rows] = ~used.any(dim=1)
    return found


def unread(module: nn.Module) -> Tensor:
    """[in] bool: columns of a Linear or Conv that are zero."""
    weight, groups = stored_weight(module), int(getattr(module, "groups", 1))
    shape = len(weight) // groups, weight.shape[1], math.prod(weight.shape[2:])
    per_group = weight.reshape(groups, *shape)
    if groups > 1:
        return ~per_group.any(dim=1).any(dim=2).flatten()
    used = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    for rows in blocks(weight):  # as for constant_rows
        used |= per_group[0, rows].any(dim=0).any(dim=1)
    return ~used


def is_constant(module: nn.Module) -> bool:
    """Whether a layer gives the same whatever it reads: no weight is left in it."""
    if type(module) is AffineGate:
        return module.is_constant()
    if type(module) in (*WEIGHTED, *BATCH_NORM, nn.LayerNorm):
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.numel() == 0 or bool(weight[0].any()):
            return False  # most layers have a weight in their first row: no need to read them all
        return not any(bool(weight[rows].any()) for rows in blocks(weight))
    return False
