"""Small models of every architecture that folding must know, with random gates."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse.reduce.gate import AffineGate

GATES = ("relu", "gelu", "on", "off", "mixed", "six", "slope", "empty")


def rectifier(kind: str, channels: int, dim: int) -> nn.Module:
    """A rectifier, or the gate that pruning has left of it."""
    if kind in ("relu", "empty"):
        return nn.ReLU()
    if kind == "gelu":
        return nn.GELU()
    scale, offset = torch.ones(channels), torch.zeros(channels)
    if kind == "off":
        scale.zero_()
    elif kind == "mixed":
        scale[torch.rand(channels) < 0.5] = 0
    elif kind == "six":
        saturated = torch.rand(channels) < 0.5
        scale[saturated], offset[saturated] = 0.0, 6.0
    elif kind == "slope":
        scale.fill_(0.1)
    return AffineGate(scale, offset, dim)


def emptied(layer: nn.Module, kind: str) -> nn.Module:
    if kind == "empty":
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    return layer


def lively(model: nn.Module) -> nn.Module:
    """Normalisations as after training, and some rows without weights."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            module.eps = 1e-3
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
    return model


class Way(nn.Module):
    """Layers by name; forward is given."""

    def __init__(self, forward, **layers: nn.Module) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.way(self, x)
        return answer


class Chain(nn.Module):
    """Linear, [BatchNorm], rectifier, dropout, ..."""

    def __init__(self, kinds: Sequence[str], norm: bool = False, width: int = 7) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for kind in kinds:
            layers.append(emptied(nn.Linear(width, width), kind))
            if norm:
                layers.append(nn.BatchNorm1d(width))
            layers += [rectifier(kind, width, 1), nn.Dropout(0.2)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))

    example = (2, 7)


class Residual(nn.Module):
    """x + fc2(act(fc1(x))), several times."""

    def __init__(self, kinds: Sequence[str], width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.first = nn.ModuleList(emptied(nn.Linear(width, 9), k) for k in kinds)
        self.acts = nn.ModuleList(rectifier(k, 9, -1) for k in kinds)
        self.second = nn.ModuleList(nn.Linear(9, width, bias=i % 2 == 0) for i in range(len(kinds)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, act, second in zip(self.first, self.acts, self.second, strict=True):
            x = x + second(act(first(x)))
        return self.head(x)

    example = (2, 5)


class ConvBlock(nn.Module):
    def __init__(self, kind: str, after: bool, width: int) -> None:
        super().__init__()
        self.conv1 = emptied(nn.Conv2d(width, width, 3, padding=1, bias=False), kind)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = rectifier(kind, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, affine=False)
        self.after = nn.ReLU(inplace=True) if after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += x
        return self.after(out)


class ResNet(nn.Module):
    def __init__(self, kinds: Sequence[str], after: bool = True, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(ConvBlock(kind, after, width) for kind in kinds))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))

    example = (2, 3, 6, 6)


class ViT(nn.Module):
    """Pre-norm transformer; the class token and positions are parameters of the root."""

    def __init__(self, kinds: Sequence[str], width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 3, 3)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 5, width))
        n = range(len(kinds))
        self.norm1 = nn.ModuleList(nn.LayerNorm(width) for _ in n)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in n)
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in n)
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in n)
        self.fc1 = nn.ModuleList(emptied(nn.Linear(width, 4 * width), k) for k in kinds)
        self.acts = nn.ModuleList(rectifier(k, 4 * width, 2) for k in kinds)
        self.fc2 = nn.ModuleList(nn.Linear(4 * width, width) for _ in n)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def attention(self, x: Tensor, number: int) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv[number](x).view(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj[number](mixed.transpose(1, 2).reshape(n, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.size(0), -1, -1), x], dim=1) + self.pos
        for i in range(len(self.fc1)):
            x = x + self.attention(self.norm1[i](x), i)
            hidden = F.dropout(self.acts[i](self.fc1[i](self.norm2[i](x))), 0.1, self.training)
            x = x + self.fc2[i](hidden)
        return self.head(self.norm(x)[:, 0])

    example = (2, 3, 6, 6)


class Plain(nn.Module):
    """Convolutions without skips, depthwise and pooled, flattened into a Linear head."""

    def __init__(self, kinds: Sequence[str], width: int = 6) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2)]
        for kind in kinds:
            depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
            pointwise = emptied(nn.Conv2d(width, width, 1), kind)
            layers += [pointwise, nn.BatchNorm2d(width), rectifier(kind, width, 1), depthwise]
            layers += [nn.ReLU6(), nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(width * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.layers(x)), 1))

    example = (2, 3, 11, 11)


MODELS = {"chain": Chain, "residual": Residual, "resnet": ResNet, "vit": ViT, "plain": Plain}


def make(name: str, kinds: Sequence[str], seed: int, sparsity: float = 0.0) -> nn.Module:
    """A model whose rows (and columns) have lost their weights at random."""
    torch.manual_seed(seed)
    model = lively(MODELS[name](kinds))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and sparsity:
                module.weight[torch.rand(len(module.weight)) < sparsity] = 0
    return model


def inputs(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(model.example, generator=generator).to(dtype)  # type: ignore[arg-type]


def in_float64(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own answer in float64, computed without anything of the package."""
    with torch.no_grad():
        answer: Tensor = copy.deepcopy(model).eval().double()(x.double())
    return answer
