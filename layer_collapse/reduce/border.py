"""What a merged convolution reads otherwise than the two it came from: decided by enumeration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .convolutions import ZEROS, Geometry, composed


def source(place: Tensor, size: int, mode: str) -> Tensor:
    """Index of what padding puts at each place of an axis of ``size`` numbers; -1 for a zero."""
    if mode == "circular":
        return place % size
    if mode == "replicate":
        return place.clamp(0, size - 1)
    if mode == "reflect":
        return size - 1 - (size - 1 - place.abs()).abs()
    return place.masked_fill((place < 0) | (place >= size), -1)


@dataclass(frozen=True)
class Border:
    """What a merged convolution in a padding ``mode`` reads otherwise than the two.

    Attributes:
        mode: the padding mode of the merged convolution.
        windows: share of outputs that read other inputs than before.
        bias: share of outputs that do so or that read zeros of the second layer's padding, where
            the merged one sees the first layer's bias.
        other_windows, other_bias: whether there are any at any other size.
    """

    mode: str
    windows: float
    bias: float
    other_windows: bool
    other_bias: bool


def border(inner: Geometry, outer: Geometry, sizes: Sequence[int], mode: str) -> Border:
    """Compare outer o inner with their merged form on an input of the given spatial sizes.

    Exact by enumeration: places that padding has no part in are equal by construction.
    """
    alive = right = clean = 1.0
    other_windows = other_bias = False
    whole = composed(inner, outer, mode)
    for axis, size in enumerate(sizes):
        here = _Axis.of(inner, outer, mode, axis, size)
        alive *= here.alive
        right *= here.right
        clean *= here.clean
        far = size + whole.before[axis] + whole.after[axis] + whole.reach[axis]
        for other in range(far, far + whole.stride[axis]):  # every remainder that strides leave
            there = _Axis.of(inner, outer, mode, axis, other)
            other_windows |= there.right < there.alive
            other_bias |= there.clean < 1
    return Border(mode, alive - right, 1 - clean, other_windows, other_bias)


@dataclass(frozen=True)
class _Axis:
    """Shares of the outputs along one axis.

    An output that reads padding alone is zero whatever the other axes read; the others are
    ``alive``, and ``right`` if they read the same inputs. ``clean`` ones read the same inputs and
    no zeros between.
    """

    alive: float
    right: float
    clean: float

    @staticmethod
    def of(inner: Geometry, outer: Geometry, mode: str, axis: int, size: int) -> _Axis:
        middle = inner.output(axis, size)
        number = outer.output(axis, middle)
        taps = torch.arange(outer.kernel[axis]) * outer.dilation[axis] - outer.before[axis]
        reads = torch.arange(number)[:, None] * outer.stride[axis] + taps  # [number, k2]
        deeper = torch.arange(inner.kernel[axis]) * inner.dilation[axis] - inner.before[axis]
        stride = inner.stride[axis]
        low, high = reads[:, 0], reads[:, -1]
        outside = (low < 0) | (high >= middle)
        outside |= (low * stride + deeper[0] < 0) | (high * stride + deeper[-1] >= size)
        reads = reads[outside]
        between = source(reads, middle, outer.mode)
        ours = source(reads[..., None] * stride + deeper, size, mode)
        theirs = source(between[..., None] * stride + deeper, size, inner.mode)
        theirs = theirs.masked_fill(between[..., None] < 0, -1)
        dead = (torch.maximum(ours, theirs) < 0).flatten(1).all(1)
        wrong = (ours != theirs).flatten(1).any(1)
        lost, dirty = int(dead.sum()), wrong | (between < 0).any(1)
        return _Axis(
            alive=1 - lost / number,
            right=1 - (lost + int(wrong.sum())) / number,
            clean=1 - int(dirty.sum()) / number,
        )


def best_border(inner: Geometry, outer: Geometry, sizes: Sequence[int]) -> Border:
    """The border under the padding mode that keeps most outputs as they were."""
    modes = [g.mode for g in (inner, outer) if g.padded] or [ZEROS]
    found = [border(inner, outer, sizes, mode) for mode in dict.fromkeys(modes)]
    return min(found, key=lambda b: (b.windows, b.bias))
