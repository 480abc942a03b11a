"""Random layers with the gates that pruning leaves between them.

Each choice is noted as (family, class), so that a test can tell which classes it has seen, and how
often.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layer_collapse.reduce.gate import AffineGate

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GLOBAL_POOL = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_LIVE: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
}

#: Every class that is drawn. A share is taken among all draws of the family.
CLASSES: dict[str, tuple[str, ...]] = {
    "network": ("conv chain", "residual", "inverted bottleneck", "dense", "mixed", "linear chain",
                "residual mlp"),
    "dims": ("1", "2", "3"),
    "kernel": ("1", "2", "3", "4", "5", "mixed"),
    "stride": ("1", "2", "3", "mixed", "tile"),
    "padding": ("0", "half", "more", "mixed", "same"),
    "padding mode": ("zeros", "reflect", "replicate", "circular"),
    "dilation": ("1", "2", "3"),
    "groups": ("1", "grouped", "depthwise", "multiplied"),
    "bias": ("yes", "no"),
    "norm": ("trained", "centred", "without affine", "with zeros"),
    "norm place": ("before gate", "behind gate", "between", "in front"),
    "gate": ("on", "mixed", "slope", "saturated", "any", "off", "constant", *_LIVE, "prelu"),
    "shortcut": ("identity", "1x1", "1x1 with norm"),
    "pooling": ("max", "average", "global"),
    "weights": ("dense", "rows without weights", "sparse", "empty branch"),
    "hazard": ("none", "shared", "hook", "used twice"),
    "border": ("refuse", "biasmap", "ring"),
}  # fmt: skip


class Builder:
    """Draws layers and follows the shape of the value they are applied to.

    ``size`` is the spatial size, empty where features lie on the last dim (Linear).
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: list[tuple[str, str]] = []
        self.weights = self.choose("weights", "dense", "dense", "rows without weights", "sparse")
        self.mode = self.pick("zeros", "zeros", "zeros", "circular", "reflect", "replicate", "any")
        self.channels, self.size, self.tokens = 1, list[int](), False
        self.in_branch = False

    def pick(self, *options: Any) -> Any:
        return self._random.choice(options)

    def often(self, percent: int) -> bool:
        return self._random.randrange(100) < percent

    def choose(self, family: str, *options: str) -> str:
        """One of some classes, noted."""
        chosen = str(self.pick(*options))
        self.drawn.append((family, chosen))
        return chosen

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def some(self, share: float) -> Tensor:
        """[channels] bool, one of them False."""
        chosen = torch.rand(self.channels, generator=self.generator) < share
        chosen[self.pick(*range(self.channels))] = False
        return chosen

    # Layers

    def conv(
        self,
        out: int | None = None,
        kernel: str = "",
        keep: str = "",
        stride: str = "",
        groups: str = "",
        extra: int = 0,
        bias: str = "",
    ) -> nn.Module:
        """A convolution; it becomes 1x1 without padding where the drawn one would not fit.

        Args:
            out: channels; like kernel, stride and groups drawn by default.
            keep: "size": odd kernels with padding that keeps the size (divided by the stride);
                "valid": odd kernels without padding; stride 1 by default in both; "tile": windows
                side by side.
            extra: padding on top.
        """
        dims = len(self.size)
        kernel = kernel or self.pick(*"111233345", "mixed", "mixed", "mixed")
        k = [self.pick(1, 2, 3) for _ in range(dims)] if kernel == "mixed" else [int(kernel)] * dims
        if keep in ("size", "valid"):
            k = [size + 1 - size % 2 for size in k]
        d = [1 if max(k) == 1 or extra or keep == "tile" else self.pick(1, 1, 1, 1, 2, 2, 3)] * dims
        stride = (
            stride
            or {"size": "1", "valid": "1", "tile": "tile"}.get(keep)
            or self.pick(*"111123", "mixed", "mixed", "tile")
        )
        padding = {"size": "half", "valid": "0", "tile": "0"}.get(keep) or self.pick(
            "0", "0", "half", "more", "mixed", "mixed", "same", "same", "same"
        )
        s = {"mixed": [self.pick(1, 2) for _ in k], "tile": list(k)}.get(stride)
        s = s or [int(stride)] * dims
        half = [a * (b - 1) // 2 for a, b in zip(d, k, strict=True)]
        p = {
            "0": [0] * dims,
            "more": [a + 1 for a in half],
            "mixed": [self.pick(0, 1, 2) for _ in k],
        }.get(padding, half)
        p = [a + extra for a in p]
        mode = self.mode if self.mode != "any" else self.pick(*CLASSES["padding mode"])
        out_size = [
            (n + 2 * b - e * (a - 1) - 1) // c + 1
            for n, a, b, c, e in zip(self.size, k, p, s, d, strict=True)
        ]
        limit = {"reflect": -1, "circular": 0}.get(mode, 99)
        if min(out_size) < 1 or any(b > n + limit for b, n in zip(p, self.size, strict=True)):
            k = s = d = [1] * dims
            p, out_size = [0] * dims, list(self.size)
        same = padding == "same" and max(s) == 1 and all(
            a * (b - 1) % 2 == 0 for a, b in zip(d, k, strict=True)
        )  # fmt: skip
        self._note_geometry(k, s, p, d, mode, same)
        g, out = self._groups(groups, out)
        with_bias = self.choose("bias", *([bias] if bias else ("yes", "no"))) == "yes"
        layer = CONV[dims - 1](
            self.channels, out, tuple(k), tuple(s), "same" if same else tuple(p), tuple(d), g,
            with_bias, mode,
        )  # type: ignore[arg-type]  # fmt: skip
        self.channels, self.size = out, out_size
        return self._filled(layer)

    def _note_geometry(self, k, s, p, d, mode: str, same: bool) -> None:  # type: ignore[no-untyped-def]
        def label(sizes: list[int]) -> str:
            return str(sizes[0]) if len(set(sizes)) == 1 else "mixed"

        self.drawn.append(("kernel", label(k)))
        tile = s == k and max(k) > 1 and max(d) == 1 and max(p) == 0
        self.drawn.append(("stride", "tile" if tile else label(s) if max(s) < 4 else "tile"))
        if max(k) > 1:
            self.drawn.append(("dilation", label(d)))
        half = [a * (b - 1) // 2 for a, b in zip(d, k, strict=True)]
        kinds = {"0": max(p) == 0, "same": same, "half": p == half, "mixed": len(set(p)) > 1}
        self.drawn.append(("padding", next((name for name, is_ in kinds.items() if is_), "more")))
        if max(p):
            self.drawn.append(("padding mode", mode))

    def _groups(self, wanted: str, out: int | None) -> tuple[int, int]:
        """Groups and output channels."""
        channels = self.channels
        kind = wanted or self.pick("1", "1", "grouped", "grouped", "depthwise", "multiplied")
        if kind == "depthwise" and out in (None, channels) and channels > 1:
            g = out = channels
        elif kind == "multiplied" and 1 < channels <= 4 and out in (None, 2 * channels):
            g, out = channels, 2 * channels
        else:
            out = out or self.pick(2, 3, 4, 6)
            common = [n for n in (2, 3) if channels % n == 0 and out % n == 0]
            g = self.pick(*common) if kind == "grouped" and common else 1
        name = "1" if g == 1 else "grouped" if g < channels else (
            "depthwise" if out == channels else "multiplied"
        )  # fmt: skip
        self.drawn.append(("groups", name))
        return g, out

    def linear(self, out: int | None = None) -> nn.Module:
        out = out or self.pick(2, 3, 5, 8)
        layer = nn.Linear(self.channels, out, bias=self.choose("bias", "yes", "no") == "yes")
        self.channels = out
        return self._filled(layer)

    def _filled(self, layer: nn.Module) -> nn.Module:
        """Weights that keep the scale of what they are applied to."""
        layer.double()
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight.copy_(self.randn(*weight.shape) / math.sqrt(weight[0].numel()))
            if self.weights == "sparse":
                weight[torch.rand(weight.shape, generator=self.generator) < 0.5] = 0
            elif self.weights == "rows without weights":
                weight[self.some(0.3)] = 0
            if isinstance(bias, Tensor):
                bias.copy_(self.randn(*bias.shape))
        return layer

    def norm(self, place: str) -> nn.Module:
        """BatchNorm as after training; "centred" shifts nothing."""
        self.drawn.append(("norm place", place))
        kind = self.choose("norm", *CLASSES["norm"])
        layer = _NORM[max(len(self.size), 1) - 1](
            self.channels, eps=self.pick(1e-5, 1e-3, 0.1), affine=kind != "without affine"
        ).double()
        with torch.no_grad():
            layer.running_var.copy_(0.3 + self.randn(self.channels).abs())
            if kind != "centred":
                layer.running_mean.copy_(self.randn(self.channels))
            if layer.affine:
                layer.weight.copy_(self.randn(self.channels))
            if layer.affine and kind != "centred":
                layer.bias.copy_(self.randn(self.channels))
            if kind == "with zeros":
                layer.weight[self.some(0.4)] = 0
        return layer

    def gate(self) -> nn.Module:
        """A rectifier that still lives, or the gate that pruning has left of one."""
        gates = ["on", "mixed", "mixed", "slope", "saturated", "any"] * 2
        inside = ["off", "constant", "constant"] * 3 if self.in_branch else []
        kind = self.choose("gate", *gates, *inside, *_LIVE, "prelu")
        if kind in _LIVE:
            return _LIVE[kind]()
        channels = self.channels
        if kind == "prelu":
            return nn.PReLU(channels if self.size else 1).double()
        some = self.some(0.5)
        scale = torch.ones(channels, dtype=torch.float64)
        offset = torch.zeros(channels, dtype=torch.float64)
        if kind == "mixed":
            scale[some] = 0
        elif kind == "slope":
            scale[some] = 0.1
        elif kind == "saturated":
            scale[some], offset[some] = 0, 6
        elif kind == "any":
            scale, offset = self.randn(channels), self.randn(channels)
        elif kind == "off":
            scale.zero_()
        elif kind == "constant":
            scale.zero_()
            offset = self.randn(channels)
        behind = -1 - len(self.size)
        return AffineGate(scale, offset, behind if self.tokens else self.pick(1, behind))

    def pool(self) -> list[nn.Module]:
        if min(self.size) < 2 or not self.often(20):
            return []
        kind = self.choose("pooling", "max", "average")
        self.size = [n // 2 for n in self.size]
        return [(_MAX_POOL if kind == "max" else _AVG_POOL)[len(self.size) - 1](2)]

    def unit(self, **geometry: Any) -> list[nn.Module]:
        """A layer with the normalisation and the gate around it, in every order."""
        order = self.pick(
            "layer", "layer", "layer", "layer gate", "layer gate", "layer norm", "layer norm gate",
            "layer gate norm", "norm layer", "norm gate layer",
        )  # fmt: skip
        parts: list[nn.Module] = []
        for what in order.split():
            if what == "layer":
                parts.append(self.conv(**geometry) if self.size else self.linear(**geometry))
            elif what == "gate":
                parts.append(self.gate())
            elif not self.tokens:  # BatchNorm1d on tokens would normalise positions
                places = {"layer norm": "between", "layer norm gate": "before gate"}
                places |= {"layer gate norm": "behind gate"}
                parts.append(self.norm(places.get(order, "in front")))
        if self.often(20):
            parts.append(self.pick(nn.Dropout(0.3), nn.Identity()))
        return parts
