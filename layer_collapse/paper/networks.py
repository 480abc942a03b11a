"""The networks of the experiments, each with the task that it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data, models
from ..models.efficientnet_lite import efficientnet_lite0
from ..models.encoder import minilm
from ..text import Sentences, movie_snippets, trec_questions
from ..training import Recipe
from .loops import Part

__all__ = ["NETWORKS", "Network", "Task"]

_SENTENCE_SPLIT_SEED = 20240416  # constant: all seeds and versions compare on the same sentences


@dataclass(frozen=True)
class Task:
    """Three disjoint splits; ``test`` takes part in no choice."""

    training: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    Attributes:
        family: "cnn", "vit" or "nlp".
        build: makes it from torch's global generator, or loads pretrained weights.
        task: loads the data; its argument is the folder of Fashion-MNIST, None for the default.
        sizes: what every figure must say, in words.
    """

    family: str
    build: Callable[[], nn.Module]
    task: Callable[[Path | None], Task]
    recipe: Recipe
    sizes: str


def _images(root: Path | None, *, samples: int, side: int = 28) -> Task:
    found = data.load("fashion-mnist", root, train_samples=samples)

    black, white = found.train.x.min(), found.train.x.max()  # pixels 0 and 255, standardised

    def part(split: data.Split) -> Part:
        if side == 28:
            return Part(split.x, split.y)
        return Part(_as_photograph((split.x - black) / (white - black), side), split.y)

    held = data.Split(found.validation.x[:2000], found.validation.y[:2000])
    test = found.test if side == 28 else data.Split(found.test.x[:2000], found.test.y[:2000])
    return Task(part(found.train), part(held), part(test))


def _as_photograph(x: Tensor, side: int) -> Tensor:
    """Grey images [N, 1, H, W] from 0 to 1 as EfficientNet-Lite reads [N, 3, side, side]."""
    larger = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    return ((larger - 0.498) / 0.502).expand(-1, 3, -1, -1).contiguous()


def _sentences(root: Path | None, *, load: Callable[[], Sentences], samples: int) -> Task:
    found = load()
    generator = torch.Generator().manual_seed(_SENTENCE_SPLIT_SEED)
    order = torch.randperm(len(found), generator=generator)
    parts = order[:1000], order[1000:2000], order[2000 : 2000 + samples]
    test, validation, training = (
        Part({"input_ids": found.ids[i], "attention_mask": found.mask[i]}, found.y[i])
        for i in parts
    )
    return Task(training, validation, test)


def _efficientnet() -> nn.Module:
    model = efficientnet_lite0()
    model.head = nn.Linear(model.head.in_features, 10)
    return model


_SGD = Recipe(lr=0.05)
_ADAM = Recipe("adamw", lr=1e-3, weight_decay=0.01)
_FINE_TUNING = Recipe("adamw", lr=5e-5, weight_decay=0.01, batch=32)
_SHAPE = (1, 28, 28)


def _encoder(classes: int, activation: str, load: Callable[[], Sentences], about: str) -> Network:
    return Network(
        "nlp",
        partial(minilm, classes, activation),
        partial(_sentences, load=load, samples=2000),
        _FINE_TUNING,
        f"{about}: 2,000 sentences of at most 32 tokens, 1,000 to validate, 1,000 to test",
    )


def _transformer(activation: str) -> Network:
    return Network(
        "vit",
        partial(models.build, "vit", _SHAPE, 10, activation=activation),
        partial(_images, samples=10_000),
        _ADAM,
        "Fashion-MNIST 28x28: 10,000 images, 2,000 to validate, 10,000 to test",
    )


NETWORKS = {
    "resnet20": Network(
        "cnn",
        partial(models.build, "resnet", _SHAPE, 10),
        partial(_images, samples=5_000),
        _SGD,
        "Fashion-MNIST 28x28: 5,000 images, 2,000 to validate, 10,000 to test",
    ),
    "efficientnet-lite0": Network(
        "cnn",
        _efficientnet,
        partial(_images, samples=2_000, side=64),
        Recipe(lr=0.02, batch=64),
        "Fashion-MNIST at 64x64, pretrained: 2,000 images, 2,000 to validate, 2,000 to test",
    ),
    "vit-relu": _transformer("relu"),
    "vit-gelu": _transformer("gelu"),
    "minilm-relu-movies": _encoder(2, "relu", movie_snippets, "film snippets"),
    "minilm-gelu-movies": _encoder(2, "gelu", movie_snippets, "film snippets"),
    "minilm-relu-trec": _encoder(6, "relu", trec_questions, "TREC questions"),
    "minilm-gelu-trec": _encoder(6, "gelu", trec_questions, "TREC questions"),
}
"""By the name that reports call them; ReLU is swapped in for GELU where the name says so."""
