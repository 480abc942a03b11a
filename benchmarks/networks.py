"""The networks of the whole steps and passes, with a batch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse.models.resnet import ResNet
from layer_collapse.models.vit import ViT

CLASSES = 10


class EncoderLayer(nn.Module):
    """BERT's layer on [B, T, width]: attention and MLP, each followed by its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=seen)
        x = self.norm1(x + self.proj(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(self.act(self.fc1(x))))


class Encoder(nn.Module):
    """Two layers over token ids [B, T]; padding is where ``attention_mask`` [B, T] is 0."""

    def __init__(
        self, vocabulary: int = 8192, width: int = 256, heads: int = 4, tokens: int = 128
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layer1 = EncoderLayer(width, heads)
        self.layer2 = EncoderLayer(width, heads)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = attention_mask[:, None, None, :] != 0
        x = self.words(ids) + self.places
        out: Tensor = self.head(self.layer2(self.layer1(x, seen), seen)[:, 0])
        return out


def resnet18() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """ResNet-18 with the stem for 32 x 32 images; batch 128."""
    model = ResNet((3, 32, 32), CLASSES, widths=(64, 128, 256, 512), blocks=2, stem_stride=1)
    return model, (torch.randn(128, 3, 32, 32),)


def vit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """ViT of depth 6 and width 192 with GELU on 64 tokens; batch 64."""
    model = ViT(
        (3, 32, 32), CLASSES, depth=6, width=192, heads=3, patch=4, mlp_ratio=4, activation="gelu"
    )
    return model, (torch.randn(64, 3, 32, 32),)


def encoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The encoder on 32 sentences of 32 to 128 tokens."""
    lengths = torch.randint(32, 129, (32, 1))
    mask = (torch.arange(128) < lengths).long()
    return Encoder(), (torch.randint(8192, (32, 128)) * mask, mask)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "resnet18": resnet18,
    "vit": vit,
    "encoder": encoder,
}


def training_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """One step of plain torch SGD on one batch; returns the loss."""
    targets = torch.arange(len(inputs[0])) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(*inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def evaluation(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The logits of one batch in evaluation mode."""
    model.eval()

    def forward() -> Tensor:
        with torch.no_grad():
            return model(*inputs)

    return forward
