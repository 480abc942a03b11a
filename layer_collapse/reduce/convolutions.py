"""Arithmetic on convolutions: two in a row as one, kernels on other grids, what padding reads.

Per dim, with kernel k, stride s, padding p and dilation d, conv2 o conv1 has K = d1 (k1 - 1) +
s1 d2 (k2 - 1) + 1, stride s1 s2 and padding p1 + s1 p2: taps of W1 lie d1 apart, those of W2 s1 d2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from .float64 import call
from .gate import smallest_form
from .layers import bias_of, per_channel, scaled_columns, weight_of, with_tensors

Sizes = tuple[int, ...]
ZEROS = "zeros"


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads: tap t of output v is at ``stride v + dilation t - before``.

    ``before`` and ``after`` are the padding on either side, of one ``mode`` ("zeros" for none).
    """

    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    before: Sizes
    after: Sizes
    mode: str = ZEROS

    @property
    def padded(self) -> bool:
        """Whether anything is read that is not in the input."""
        return any(self.before) or any(self.after)

    @property
    def reach(self) -> Sizes:
        """d (k - 1): from the first tap to the last."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def ndim(self) -> int:
        """Number of spatial dims."""
        return len(self.kernel)

    @property
    def large(self) -> Sizes:
        """An input size at which no output reads padding on both sides."""
        parts = zip(self.before, self.after, self.reach, self.stride, strict=True)
        return tuple(sum(part) for part in parts)

    def output(self, axis: int, size: int) -> int:
        """Number of outputs along an axis of the given size."""
        room = size + self.before[axis] + self.after[axis] - self.reach[axis] - 1
        return room // self.stride[axis] + 1


def geometry_of(conv: nn.Module) -> Geometry:
    """Geometry of a convolution, its padding in numbers."""
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    kernel, dilation = tuple(conv.kernel_size), tuple(conv.dilation)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before, after = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    elif isinstance(conv.padding, str):
        before = after = (0,) * len(kernel)
    else:
        before = after = tuple(int(p) for p in conv.padding)
    mode = conv.padding_mode if any(after) else ZEROS
    return Geometry(kernel, tuple(conv.stride), dilation, before, after, mode)


def composed(inner: Geometry, outer: Geometry, mode: str) -> Geometry:
    """Geometry of outer o inner, dilated as far as all taps allow."""
    steps = [_steps(inner, outer, axis) for axis in range(len(inner.kernel))]
    dilation = tuple(math.gcd(*step) or 1 for step in steps)
    reach = [a + s * b for a, s, b in zip(inner.reach, inner.stride, outer.reach, strict=True)]
    moved = zip(inner.stride, inner.before, inner.after, outer.before, outer.after, strict=True)
    padding = [(b1 + s * b2, a1 + s * a2) for s, b1, a1, b2, a2 in moved]
    return Geometry(
        kernel=tuple(r // d + 1 for r, d in zip(reach, dilation, strict=True)),
        stride=tuple(a * b for a, b in zip(inner.stride, outer.stride, strict=True)),
        dilation=dilation,
        before=tuple(p[0] for p in padding),
        after=tuple(p[1] for p in padding),
        mode=mode,
    )


def _steps(inner: Geometry, outer: Geometry, axis: int) -> tuple[int, int]:
    """Distance of the taps of either kernel in the input; 0 for a single tap."""
    first = inner.dilation[axis] if inner.kernel[axis] > 1 else 0
    second = inner.stride[axis] * outer.dilation[axis] if outer.kernel[axis] > 1 else 0
    return first, second


def merged(first: nn.Module, second: nn.Module, mode: str) -> nn.Module:
    """second(first(x)) as one layer of the second's type, whatever happens at the border.

    gcd(g1, g2) groups stay. b = sum over all taps of W2 b1, plus b2.
    """
    inner, outer = geometry_of(first), geometry_of(second)
    whole = composed(inner, outer, mode)
    groups = math.gcd(int(first.groups), int(second.groups))  # type: ignore[arg-type]
    bias, sent = bias_of(second), bias_of(first)
    if sent is not None:
        added = scaled_columns(second, sent).flatten(1).sum(1)
        bias = added if bias is None else bias + added
    weight = _product(first, second, whole, groups)
    return as_conv(second, weight, bias, whole, groups)


def _product(first: nn.Module, second: nn.Module, whole: Geometry, groups: int) -> Tensor:
    """W[o, i, a2 j + a1 k] = sum over c of W2[o, c, j] W1[c, i, k], in ``groups``.

    One batched matrix product per tap j, over W1's own groups: within a group of the result every
    row of W2 reads all of them once it is written out with zeros.
    """
    inner, outer = geometry_of(first), geometry_of(second)
    own = int(first.groups)  # type: ignore[arg-type]
    left = regrouped(weight_of(second), int(second.groups), groups)  # type: ignore[arg-type]
    rows, right = left.shape[0] // groups, weight_of(first)
    left = left.reshape(groups, rows, own // groups, -1, *outer.kernel).transpose(1, 2)
    left = left.reshape(own, rows, -1, *outer.kernel)  # [g1, O / G, C / g1, *k2]
    right = right.reshape(own, left.shape[2], -1)  # [g1, C / g1, I / g1 * k1]
    columns = weight_of(first).shape[1]
    weight = right.new_zeros(own, rows, columns, *whole.kernel)
    steps = [_steps(inner, outer, axis) for axis in range(inner.ndim)]
    for tap in product(*(range(k) for k in outer.kernel)):
        here = [slice(None)] * 3
        for t, (a, b), d, k in zip(tap, steps, whole.dilation, inner.kernel, strict=True):
            start, step = t * b // d, max(a // d, 1)
            here.append(slice(start, start + step * (k - 1) + 1, step))
        at = (slice(None),) * 3 + tap
        weight[tuple(here)] += (left[at] @ right).view(own, rows, columns, *inner.kernel)
    weight = weight.view(groups, own // groups, rows, columns, *whole.kernel).transpose(1, 2)
    return weight.reshape(groups * rows, -1, *whole.kernel)


def regrouped(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """A weight [O, C / groups, ...] in fewer groups: [O, C / fewer, ...], zero between the old."""
    if groups == fewer:
        return weight
    inside, tail = groups // fewer, weight.shape[2:]
    split = weight.reshape(fewer, inside, -1, 1, weight.shape[1], *tail)
    own = torch.eye(inside, dtype=weight.dtype, device=weight.device)
    own = own.view(1, inside, 1, inside, 1, *[1] * len(tail))
    return (split * own).reshape(weight.shape[0], -1, *tail)


def placed(weight: Tensor, offset: Sizes, step: Sizes, kernel: Sizes) -> Tensor:
    """A kernel of the given size, zero but for ``weight`` from ``offset`` on, ``step`` apart."""
    new = weight.new_zeros(*weight.shape[:2], *kernel)
    here = [slice(None), slice(None)]
    for first, s, k in zip(offset, step, weight.shape[2:], strict=True):
        here.append(slice(first, first + s * (k - 1) + 1, s))
    new[tuple(here)] = weight
    return new


def as_conv(
    like: nn.Module, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> nn.Module:
    """A layer of the type of ``like`` with this weight [O, C / groups, *kernel] and geometry.

    A layer pads both sides alike or as "same" does; elsewhere taps of zero make up for it.
    """
    reach, before, after = geometry.reach, geometry.before, geometry.after
    same = [(t // 2, t - t // 2) for t in reach]
    padding: str | Sizes = before
    if before != after and set(geometry.stride) == {1} and same == list(zip(before, after)):  # noqa: B905
        padding = "same"
    elif before != after:
        gaps = [a - b for a, b in zip(after, before, strict=True)]
        thin = [not gap % d for gap, d in zip(gaps, geometry.dilation, strict=True)]
        dilation = tuple(d if t else 1 for d, t in zip(geometry.dilation, thin, strict=True))
        step = tuple(1 if t else d for d, t in zip(geometry.dilation, thin, strict=True))
        front = tuple(max(gap, 0) // d for gap, d in zip(gaps, dilation, strict=True))
        kernel = tuple(
            (r + abs(gap)) // d + 1 for r, gap, d in zip(reach, gaps, dilation, strict=True)
        )
        weight = placed(weight, front, step, kernel)
        geometry = replace(geometry, kernel=kernel, dilation=dilation)
        padding = tuple(max(a, b) for a, b in zip(after, before, strict=True))
    new = with_tensors(like, weight=weight, bias=bias)
    new.in_channels, new.out_channels = weight.shape[1] * groups, weight.shape[0]  # type: ignore[assignment]
    new.kernel_size, new.stride = geometry.kernel, geometry.stride  # type: ignore[assignment]
    new.dilation, new.groups = geometry.dilation, groups  # type: ignore[assignment]
    pad(new, padding, geometry.mode)
    return new


def pad(conv: nn.Module, padding: str | Sizes, mode: str) -> None:
    """Give a convolution another padding."""
    conv.padding, conv.padding_mode = padding, mode  # type: ignore[assignment]
    after, before = (getattr(geometry_of(conv), side)[::-1] for side in ("after", "before"))
    # What nn.Conv hands to F.pad in modes other than zeros: last dim first, front before back.
    pairs = [size for pair in zip(before, after, strict=True) for size in pair]
    conv._reversed_padding_repeated_twice = pairs  # type: ignore[assignment]


def answer(conv: nn.Module, sent: Tensor) -> Tensor | None:
    """What a constant [C] adds to every output of a convolution, [O]; None for a border map."""
    geometry = geometry_of(conv)
    # Large enough for every border: a small image may lie wholly within the kernel.
    given = sent.view(1, -1, *[1] * geometry.ndim).expand(1, -1, *geometry.large)
    with torch.no_grad():
        image: Tensor = call(with_tensors(conv, bias=None), [given])
    return per_channel(smallest_form(image), tuple(image.shape), 1)
