"""A small vision transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse.models.options import activation_module, check_positive, image_shape

__all__ = ["ViT"]


class Attention(nn.Module):
    """Multi-head self-attention on [N, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [N, tokens, 3, heads, d]
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, N, heads, tokens, d]
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class ViTBlock(nn.Module):
    """Pre-norm transformer block on [N, tokens, width]: attention, then an MLP."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation_module(activation)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return out


class ViT(nn.Module):
    """Vision transformer, pre-norm, with the mean over tokens instead of a class token.

    Args:
        input_shape: (channels, height, width).
        classes: number of logits.
        depth: blocks, one rectifier each.
        width: features of a token, a multiple of ``heads``.
        heads: attention heads.
        patch: side of a square patch in pixels, dividing height and width; None takes a quarter of
            the height (16 tokens from a square image).
        mlp_ratio: hidden features of a block's MLP over ``width``.
        activation: ``relu`` or ``gelu``.

    Raises:
        ValueError: a size below 1, sizes that do not divide, or an unknown activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        depth: int = 6,
        width: int = 64,
        heads: int = 4,
        patch: int | None = None,
        mlp_ratio: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels, rows, columns = image_shape(input_shape)
        patch = max(rows // 4, 1) if patch is None else patch
        check_positive(classes=classes, depth=depth, width=width, heads=heads)
        check_positive(patch=patch, mlp_ratio=mlp_ratio)
        if rows % patch or columns % patch:
            raise ValueError(
                f"model: expected a patch that divides {rows} x {columns} pixels (got {patch})"
            )
        if width % heads:
            raise ValueError(
                f"model: expected width to be a multiple of {heads} heads (got {width})"
            )
        tokens = (rows // patch) * (columns // patch)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(
            *(ViTBlock(width, heads, mlp_ratio * width, activation) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, *input_shape] to logits [N, classes]."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position  # [N, tokens, width]
        out: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return out
