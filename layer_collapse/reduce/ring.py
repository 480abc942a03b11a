"""Two convolutions as one, corrected where the second one's zero padding lies between them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .border import source
from .convolutions import ZEROS, Geometry, geometry_of

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class RingConv(nn.Module):
    """``second(first(x))``: the merged convolution, less what it sees where the second saw zeros.

    On the ring of the second layer's padding the merged layer has W1 x + b1. W2 of that ring is
    subtracted: both layers still run, on strips along the border whose work grows with the
    perimeter. Exact for every size.

    Args:
        merged: both as one, see :func:`~layer_collapse.reduce.convolutions.merged`.
        first: the first layer; all three are of one dimension.
        second: the second layer, padded with zeros; its bias is not used.
    """

    depth = 2  # of weighted layers, one behind the other

    def __init__(self, merged: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.merged, self.first, self.second = merged, first, second

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [N, C, ...] or [C, ...], as a convolution takes it."""
        inner, outer = geometry_of(self.first), geometry_of(self.second)
        y: Tensor = self.merged(x)
        axes = range(len(inner.kernel))
        middle = [inner.output(a, x.shape[a - len(axes)]) for a in axes]
        for axis, left in product(axes, (True, False)):
            span = _ring(outer, axis, middle[axis], y.shape[axis - len(axes)], left)
            if span is not None:
                y = y - self._sent(x, inner, outer, middle, axis, span, y)
        return y

    def _sent(
        self,
        x: Tensor,
        inner: Geometry,
        outer: Geometry,
        middle: list[int],
        axis: int,
        span: tuple[int, int, int, int],
        y: Tensor,
    ) -> Tensor:
        """What one side of the ring adds to ``y``.

        The ring is cut into disjoint slabs: outside along ``axis``, inside along the axes before
        it, anywhere along those behind it.
        """
        low, high, begin, end = span
        strip = x
        edges = []  # padding of the slab until the second layer fits on it
        for a, size in enumerate(middle):
            ring = (-outer.before[a], size + outer.after[a])
            here = (low, high) if a == axis else (0, size) if a < axis else ring
            start = here[0] * inner.stride[a] - inner.before[a]
            stop = (here[1] - 1) * inner.stride[a] + inner.reach[a] - inner.before[a] + 1
            strip = _cropped(strip, a - len(middle), start, stop, inner.mode)
            if a == axis:
                first_read = begin * outer.stride[a] - outer.before[a]
                last_read = (end - 1) * outer.stride[a] - outer.before[a] + outer.reach[a]
                edges.append((low - first_read, last_read + 1 - high))
            else:
                edges.append((here[0] - ring[0], ring[1] - here[1]))
        slab = _unpadded(self.first, inner, strip)
        slab = F.pad(slab, [edge for pair in reversed(edges) for edge in pair])
        sent = _unpadded(self.second, outer, slab)
        behind = len(middle) - 1 - axis
        return F.pad(sent, [0, 0] * behind + [begin, y.shape[axis - len(middle)] - end])


def _ring(
    outer: Geometry, axis: int, middle: int, outputs: int, left: bool
) -> tuple[int, int, int, int] | None:
    """One side of the ring along an axis: places [low, high) and outputs [begin, end) behind it."""
    stride, before = outer.stride[axis], outer.before[axis]
    if left:
        low, high, begin, end = -before, 0, 0, min(-(-before // stride), outputs)
    else:
        low, high = middle, middle + outer.after[axis]
        begin, end = max(-(-(middle + before - outer.reach[axis]) // stride), 0), outputs
    return (low, high, begin, end) if low < high and begin < end else None


def _unpadded(conv: nn.Module, geometry: Geometry, x: Tensor) -> Tensor:
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    convolve = _CONV[len(geometry.kernel)]
    y: Tensor = convolve(
        x,
        conv.weight,
        conv.bias,
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=conv.groups,
    )
    return y


def _cropped(x: Tensor, dim: int, start: int, stop: int, mode: str) -> Tensor:
    """Places [start, stop) of one dim, padded where they lie outside."""
    size = x.shape[dim]
    if mode != ZEROS:
        return x.index_select(dim, source(torch.arange(start, stop, device=x.device), size, mode))
    low = min(max(start, 0), size)
    kept = x.narrow(dim, low, max(min(stop, size) - low, 0))
    missing = stop - start - kept.shape[dim]
    front = missing if kept.shape[dim] == 0 else max(-start, 0)
    return F.pad(kept, [0, 0] * (-dim - 1) + [front, missing - front])
