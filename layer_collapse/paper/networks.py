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

# The method took shape while its accuracy on the samples before these was known.
_TEST_IMAGES_FROM, _TEST_SENTENCES_FROM = 2000, 400
_SENTENCE_SPLIT_SEED = 20240416  # constant: all seeds and versions compare on the same sentences


@dataclass(frozen=True)
class Task:
    """Three disjoint splits; ``test`` takes part in no choice."""

    training: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used.

    Attributes:
        training, validation, test: samples of each split.
        side: pixels of an image's side, or longest sentence in tokens.
    """

    training: int
    validation: int
    test: int
    side: int


@dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    Attributes:
        family: "cnn", "vit" or "nlp".
        build: makes it from torch's global generator, or loads pretrained weights.
        data: what it is trained on, in words.
        load: loads the data; its first argument is the folder of Fashion-MNIST, None for the
            default.
        sizes: of the full experiments.
    """

    family: str
    build: Callable[[], nn.Module]
    data: str
    load: Callable[[Path | None, Sizes], Task]
    recipe: Recipe
    sizes: Sizes

    def task(self, root: Path | None = None, sizes: Sizes | None = None) -> Task:
        """The three splits.

        Raises:
            OSError: the data are not there and cannot be downloaded.
        """
        return self.load(root, sizes or self.sizes)

    def about(self, sizes: Sizes) -> str:
        """What every figure must say."""
        side = (
            f"at most {sizes.side} tokens"
            if self.family == "nlp"
            else f"{sizes.side}x{sizes.side} pixels"
        )
        return (
            f"{self.data}, {side}: {sizes.training:,} samples to train on, {sizes.validation:,} to "
            f"validate, {sizes.test:,} to test"
        )


def _images(root: Path | None, sizes: Sizes, *, pretrained: bool = False) -> Task:
    found = data.load("fashion-mnist", root, train_samples=sizes.training)
    black, white = found.train.x.min(), found.train.x.max()  # pixels 0 and 255, standardised

    def part(split: data.Split, samples: int, start: int = 0) -> Part:
        some = slice(start, start + samples)
        x, y = split.x[some], split.y[some]
        if pretrained:
            x = _as_photograph((x - black) / (white - black), sizes.side)
        return Part(x, y)

    return Task(
        part(found.train, sizes.training),
        part(found.validation, sizes.validation),
        part(found.test, sizes.test, _TEST_IMAGES_FROM),
    )


def _as_photograph(x: Tensor, side: int) -> Tensor:
    """Grey images [N, 1, H, W] from 0 to 1 as EfficientNet-Lite reads [N, 3, side, side]."""
    larger = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    return ((larger - 0.498) / 0.502).expand(-1, 3, -1, -1).contiguous()


def _sentences(root: Path | None, sizes: Sizes, *, load: Callable[[int], Sentences]) -> Task:
    found = load(sizes.side)
    generator = torch.Generator().manual_seed(_SENTENCE_SPLIT_SEED)
    order = torch.randperm(len(found), generator=generator)
    # Test and validation come first, so that they are the same whatever the others' sizes.
    test = order[_TEST_SENTENCES_FROM:1000]
    validation, training = order[1000:2000], order[2000:]

    def part(index: Tensor, samples: int) -> Part:
        chosen = index[:samples]
        x = {"input_ids": found.ids[chosen], "attention_mask": found.mask[chosen]}
        return Part(x, found.y[chosen])

    return Task(
        part(training, sizes.training),
        part(validation, sizes.validation),
        part(test, sizes.test),
    )


def _efficientnet() -> nn.Module:
    model = efficientnet_lite0()
    model.head = nn.Linear(model.head.in_features, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # With its own, 0.01, a run of 128 steps leaves a quarter of ImageNet's statistics.
            module.momentum = 0.1
    return model


_SHAPE = (1, 28, 28)
_FASHION = "Fashion-MNIST"


def _cnn(name: str) -> Network:
    return Network(
        "cnn",
        partial(models.build, name, _SHAPE, 10),
        _FASHION,
        _images,
        Recipe(lr=0.05, batch=50),
        Sizes(1500, 1000, 4000, 28),
    )


def _transformer(activation: str, depth: int) -> Network:
    return Network(
        "vit",
        partial(models.build, "vit", _SHAPE, 10, activation=activation, depth=depth),
        _FASHION,
        _images,
        Recipe("adamw", lr=1e-3, weight_decay=0.01, batch=64),
        Sizes(4000, 1000, 4000, 28),
    )


def _encoder(
    classes: int, activation: str, load: Callable[[int], Sentences], about: str, tokens: int
) -> Network:
    return Network(
        "nlp",
        partial(minilm, classes, activation),
        about,
        partial(_sentences, load=load),
        Recipe("adamw", lr=1e-4, weight_decay=0.01, batch=16),
        Sizes(400, 300, 600, tokens),
    )


_FILMS, _QUESTIONS = "snippets of film reviews", "TREC questions"

NETWORKS = {
    "resnet20": _cnn("resnet"),
    "vgg-bn": _cnn("vgg"),
    "efficientnet-lite0": Network(
        "cnn",
        _efficientnet,
        f"{_FASHION}, network pretrained on ImageNet",
        partial(_images, pretrained=True),
        Recipe("adamw", lr=1e-3, weight_decay=0.01, batch=25),
        Sizes(800, 500, 1600, 64),
    ),
    "vit-relu": _transformer("relu", 6),
    "vit-gelu": _transformer("gelu", 8),
    "minilm-relu-trec": _encoder(6, "relu", trec_questions, _QUESTIONS, 16),
    "minilm-relu-movies": _encoder(2, "relu", movie_snippets, _FILMS, 24),
    "minilm-gelu-trec": _encoder(6, "gelu", trec_questions, _QUESTIONS, 16),
    "minilm-gelu-movies": _encoder(2, "gelu", movie_snippets, _FILMS, 24),
}
"""By the name that reports call them; ReLU is swapped in for GELU where the name says so."""
