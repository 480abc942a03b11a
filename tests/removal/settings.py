"""Small real tasks that the removal tests train on."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from layer_collapse import data
from layer_collapse.models import build
from layer_collapse.models.encoder import Encoder
from layer_collapse.paper.loops import Part, TrainingLoop
from layer_collapse.text import trec_questions
from layer_collapse.training import Recipe


@cache
def _images() -> tuple[Part, Part]:
    found = data.load("fashion-mnist", train_samples=300)
    x, y = found.validation.x[:200], found.validation.y[:200]
    return Part(found.train.x, found.train.y), Part(x, y)


@cache
def _questions() -> tuple[Part, Part]:
    found = trec_questions(16)
    parts = slice(0, 200), slice(200, 300)
    made = [
        Part({"input_ids": found.ids[i], "attention_mask": found.mask[i]}, found.y[i])
        for i in parts
    ]
    return made[0], made[1]


def resnet() -> tuple[nn.Module, TrainingLoop]:
    """7 rectifiers, 3 of them in branches; the first block of its second stage has a shortcut."""
    torch.manual_seed(0)
    model = build("resnet", (1, 28, 28), 10, widths=(6, 8, 8), blocks=1)
    return model, TrainingLoop(*_images(), Recipe(lr=0.05, batch=50))


def vit() -> tuple[nn.Module, TrainingLoop]:
    """3 blocks with one GELU each."""
    torch.manual_seed(0)
    model = build("vit", (1, 28, 28), 10, depth=3, width=16, heads=2, activation="gelu")
    return model, TrainingLoop(*_images(), Recipe("adamw", lr=2e-3, batch=50))


def encoder() -> tuple[nn.Module, TrainingLoop]:
    """3 blocks with one ReLU each, on TREC's questions with padding."""
    torch.manual_seed(0)
    model = Encoder(6, tokens=16, width=16, hidden=32, heads=2, blocks=3, activation="relu")
    return model, TrainingLoop(*_questions(), Recipe("adamw", lr=2e-3, batch=50))


NETWORKS = {"resnet": resnet, "vit": vit, "encoder": encoder}


class Inverted(nn.Module):
    """An inverted residual: two rectifiers in one branch; then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 8, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        self.project = nn.Conv2d(8, 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.expand(x)))
        y = self.bn3(self.project(self.act2(self.bn2(self.depthwise(y)))))
        return self.head((x + y).mean((2, 3)))


class Parallel(nn.Module):
    """Either of two branches may be cut, but not both."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.right = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)
