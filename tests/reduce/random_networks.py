"""Random networks of every family that folding must know, each from one number.

A network is an ordinary module of torch's own layers with gates where pruning would have left them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .random_layers import CLASSES, CONV, GLOBAL_POOL, Builder


def watch(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that only looks."""


class Sum(nn.Module):
    """shortcut(x) + body(x), then a rectifier or its gate."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, after: nn.Module, form: str) -> None:
        super().__init__()
        self.body, self.shortcut, self.after, self.form = body, shortcut, after, form

    def forward(self, x: Tensor) -> Tensor:
        y, kept = self.body(x), self.shortcut(x)
        if self.form == "+=":
            y += kept
        elif self.form == "torch.add":
            y = torch.add(kept, y)
        else:
            y = y + kept
        return F.relu(self.after(y)) if self.form == "+ relu" else self.after(y)


class Joined(nn.Module):
    """x beside body(x), as in a DenseNet."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], dim=1)


class UsedTwice(nn.Module):
    """second(z) + scale * z: the value between two layers is read by something else as well."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.second(z) * torch.sigmoid(z.mean())


@dataclass
class Network:
    """A random network, the input shapes to compare it on, and what it was made of."""

    model: nn.Module
    shapes: list[tuple[int, ...]]  # the first is that of the example inputs
    period: list[int]  # sizes that differ by it are strided over alike
    seed: int  # network(seed) gives it again
    border: str  # what to do where zero padding makes a merge inexact
    drawn: list[tuple[str, str]]  # (family, class)

    def inputs(self, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


# Families. Each draws its layers with a builder, which follows the shape.


def known_pair(b: Builder) -> list[nn.Module]:
    """Two convolutions that are one in spite of a padding: few random ones are."""
    before, kind = b.mode, b.pick("pointwise", "tiles", "tiles", "circular", "aligned")
    tiles = [k for k in (2, 3, 4) if not any(n % k for n in b.size)]
    kind = "pointwise" if kind == "tiles" and not tiles else kind
    b.mode = {"circular": "circular", "aligned": b.pick("reflect", "replicate", "circular")}.get(
        kind, "zeros"
    )
    first = {
        "pointwise": {"kernel": "1", "bias": "no"},
        "tiles": {"kernel": str(b.pick(*tiles or [2])), "keep": "tile", "bias": "no"},
        "circular": {"kernel": b.pick("3", "5"), "keep": "size"},
        "aligned": {"kernel": "1", "keep": "valid"},
    }[kind]
    parts = [b.conv(**first)]
    if b.often(20):
        parts.append(b.gate())
    parts.append(b.conv(kernel=b.pick("3", "3", "5"), keep="size", stride=b.pick("1", "1", "2")))
    b.mode = before
    return parts


def _chain(b: Builder, hazard: str) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for _ in range(b.pick(2, 2, 3, 3, 4)):
        parts += known_pair(b) if b.size and b.often(30) else b.unit()
        if b.size:
            parts += b.pool()
    if hazard == "shared":
        same = ("1", "size", "1")  # the second call must be able to read what the first one gives
        shared = b.conv(b.channels, *same) if b.size else b.linear(b.channels)
        parts += [shared, b.gate(), shared]
    elif hazard == "used twice":
        first = nn.Sequential(*b.unit())
        parts.append(UsedTwice(first, nn.Sequential(*b.unit())))
    return parts


def _branch(b: Builder, body: Callable[[], list[nn.Module]]) -> nn.Module:
    """A body with a way around it; a layer with neither where the shapes allow none."""
    channels, size, drawn = b.channels, list(b.size), len(b.drawn)
    b.in_branch = True
    layers = body()
    b.in_branch = False
    out_channels, out_size = b.channels, list(b.size)
    shortcut: nn.Module = nn.Identity()
    kind = "identity"
    if (channels, size) != (out_channels, out_size) or (size and b.often(15)):
        b.channels, b.size = channels, list(size)
        strides = {-(-n // m) for n, m in zip(size, out_size, strict=True)}
        kind = b.pick("1x1", "1x1 with norm")
        shortcut = b.conv(out_channels, "1", "size", str(max(strides)), "1")
        if kind == "1x1 with norm":
            shortcut = nn.Sequential(shortcut, b.norm("between"))
        if b.size != out_size:
            del b.drawn[drawn:]
            b.channels, b.size = channels, size
            return nn.Sequential(*b.unit())
    b.drawn.append(("shortcut", kind))
    if b.often(12):
        b.drawn.append(("weights", "empty branch"))
        nn.init.zeros_(b.pick(*(m for m in layers if isinstance(m, (nn.Linear, *CONV)))).weight)
    after = b.gate() if b.often(40) else nn.Identity()
    form = b.pick("+", "+=", "torch.add", "+ relu")
    return Sum(nn.Sequential(*layers), shortcut, after, form)


def _residual_body(b: Builder) -> list[nn.Module]:
    out, stride = b.pick(b.channels, b.channels, 4), b.pick("1", "1", "1", "2")
    kernels = b.pick("33", "33", "31", "13", "35", "3m", "131", "3")
    if kernels == "3m":  # all of the padding in front of the first
        return b.unit(out=out, kernel="3", keep="size", stride=stride, extra=int(stride)) + b.unit(
            out=out, kernel="3", keep="valid"
        )
    layers = b.unit(out=out, kernel=kernels[0], keep="size", stride=stride)
    for kernel in kernels[1:]:
        layers += b.unit(out=out, kernel=kernel, keep="size")
    return layers


def _residual(b: Builder) -> list[nn.Module]:
    stem = b.unit()
    return [*stem, *(_branch(b, lambda: _residual_body(b)) for _ in range(b.pick(1, 1, 2, 3)))]


def _inverted_body(b: Builder) -> list[nn.Module]:
    channels, wide = b.channels, b.pick(2, 2, 3) * b.channels
    layers = b.unit(out=min(wide, 12), kernel="1", keep="size", groups="1")
    layers += b.unit(kernel=b.pick("3", "3", "5"), keep="size", stride=b.pick("1", "1", "2"),
                     groups="depthwise")  # fmt: skip
    return layers + b.unit(out=b.pick(channels, channels, 3), kernel="1", keep="size", groups="1")


def _inverted(b: Builder) -> list[nn.Module]:
    stem = b.unit()
    return [*stem, *(_branch(b, lambda: _inverted_body(b)) for _ in range(b.pick(1, 1, 2)))]


def _dense(b: Builder) -> list[nn.Module]:
    parts = b.unit()
    for _ in range(b.pick(1, 2)):
        channels = b.channels
        parts.append(Joined(nn.Sequential(*b.unit(out=b.pick(2, 3), keep="size"))))
        b.channels += channels
    return parts + b.unit(keep="size", groups="1")


def _mixed(b: Builder) -> list[nn.Module]:
    parts = b.unit() + b.pool()
    parts.append(_branch(b, lambda: _residual_body(b)))
    return parts + b.unit() + b.pool() + b.unit()


def _mlp_body(b: Builder) -> list[nn.Module]:
    width = b.channels
    layers: list[nn.Module] = [nn.LayerNorm(width).double()] if b.often(50) else []
    layers += b.unit(out=2 * width)
    return layers + b.unit(out=width)


def _mlp(b: Builder) -> list[nn.Module]:
    return [*b.unit(), *(_branch(b, lambda: _mlp_body(b)) for _ in range(b.pick(1, 2, 2, 3)))]


def _head(b: Builder) -> tuple[list[nn.Module], bool]:
    """What a classifier ends in, and whether it takes one size of image only."""
    kind = b.pick("none", "none", "none", "global", "flat")
    features = b.channels * torch.Size(b.size).numel()
    if kind == "none":
        return [], False
    dims, b.size = len(b.size), []
    if kind == "flat" and features <= 100:
        b.channels = features
        return [nn.Flatten(), *b.unit(), *b.unit()], True
    b.drawn.append(("pooling", "global"))
    return [GLOBAL_POOL[dims - 1](1), nn.Flatten(), *b.unit(), *b.unit()], False


_FAMILIES: dict[str, Callable[[Builder], list[nn.Module]]] = {
    "residual": _residual,
    "inverted bottleneck": _inverted,
    "dense": _dense,
    "mixed": _mixed,
    "residual mlp": _mlp,
}


def _period(model: nn.Module, dims: int) -> list[int]:
    period = [1] * dims
    for name, module in model.named_modules():
        stride = getattr(module, "stride", 1)
        each = stride if isinstance(stride, tuple) else (stride,) * dims
        if "shortcut" not in name:
            period = [a * b for a, b in zip(period, each, strict=False)]
    return period


def network(seed: int) -> Network:
    """A network with at least two weighted layers, in float64 and evaluation mode."""
    b = Builder(seed)
    family = b.choose(
        "network", "conv chain", "conv chain", "conv chain", *_FAMILIES, "residual", "linear chain"
    )
    in_chain = ("shared", "used twice") if family not in _FAMILIES else ()
    hazard = b.choose("hazard", *["none"] * 10, "hook", *in_chain * 2)
    features = family in ("linear chain", "residual mlp")
    b.channels = b.pick(2, 3, 4, 6)
    if not features:
        dims = int(b.choose("dims", *"1122222233"))
        b.size = [b.pick(*((4, 5, 6) if dims == 3 else (6, 8, 8, 9, 12))) for _ in range(dims)]
    b.tokens = features and b.often(50)
    start = (2, 3, b.channels) if b.tokens else (2, b.channels, *b.size)
    parts = _FAMILIES[family](b) if family in _FAMILIES else _chain(b, hazard)
    one_size = features
    if not features:
        head, one_size = _head(b)
        parts += head
    model = nn.Sequential(*parts).eval()
    if hazard == "hook":
        weighted = [m for m in model.modules() if isinstance(m, (nn.Linear, *CONV))]
        b.pick(*weighted).register_forward_hook(watch)
    shapes = [start]
    if b.tokens:
        shapes += [(1, 1, start[2]), (3, 5, start[2])]
    elif features:
        shapes.append((5, start[1]))
    elif not one_size:
        for more in ((1, 2, 0), (3, 0, 1), (-1, -1, -1)):
            size = [n + add for n, add in zip(start[2:], more, strict=False)]
            shapes.append((1, start[1], *size))
    border = b.choose("border", *CLASSES["border"])
    return Network(model, shapes, _period(model, len(start) - 2), seed, border, b.drawn)
