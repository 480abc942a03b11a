"""The networks of the experiments and their tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from layer_collapse import data
from layer_collapse.data import FASHION_MNIST_ROOT
from layer_collapse.idx import find_fashion_mnist
from layer_collapse.paper.loops import Inputs, Part, TrainingLoop
from layer_collapse.paper.networks import NETWORKS, Sizes, _sentences
from layer_collapse.paper.suites import budget_of
from layer_collapse.text import Sentences, movie_snippets, trec_questions


def _rows(part: Part) -> set[tuple[float, ...]]:
    x: Inputs = part.x["input_ids"] if isinstance(part.x, dict) else part.x
    return {tuple(row) for row in x.flatten(1).tolist()}  # type: ignore[union-attr]


@pytest.mark.parametrize("load", [movie_snippets, trec_questions])
def test_sentences_are_split_apart(load: Callable[[int], Sentences]) -> None:
    try:
        task = _sentences(None, Sizes(2000, 1000, 600, 32), load=load)
        smaller = _sentences(None, Sizes(100, 200, 300, 32), load=load)
    except OSError as error:
        pytest.skip(str(error))
    assert [len(p) for p in (task.training, task.validation, task.test)] == [2000, 1000, 600]
    assert [len(p) for p in (smaller.training, smaller.validation, smaller.test)] == [100, 200, 300]
    assert _rows(smaller.test) <= _rows(task.test)
    places = [_rows(p) for p in (task.training, task.validation, task.test)]
    assert not places[0] & places[2]
    assert not places[1] & places[2]


@pytest.mark.parametrize("name", ["resnet20", "vgg-bn", "vit-relu", "vit-gelu"])
def test_a_network_trains_on_its_task(name: str) -> None:
    try:
        find_fashion_mnist(FASHION_MNIST_ROOT)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    network = NETWORKS[name]
    task = network.task(None)
    model = network.build()
    loop = TrainingLoop(task.training, task.validation, network.recipe)
    before = loop.loss(model)
    loop.train(model, 0.5)
    assert loop.loss(model) < before


def test_test_images_are_those_that_took_no_part_in_the_design() -> None:
    try:
        test = data.load("fashion-mnist").test
    except FileNotFoundError as error:
        pytest.skip(str(error))
    task = NETWORKS["resnet20"].task(None)
    assert torch.equal(task.test.take(slice(None)), test.x[2000:6000])
    assert torch.equal(task.test.y, test.y[2000:6000])


def test_missing_data_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"[Ff]ashion"):
        NETWORKS["resnet20"].task(tmp_path)


def test_a_pretrained_network_sees_pixels_scaled_as_it_was_trained() -> None:
    black, white = (0 - 0.498) / 0.502, (1 - 0.498) / 0.502
    try:
        find_fashion_mnist(FASHION_MNIST_ROOT)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    x = NETWORKS["efficientnet-lite0"].task(None).training.x
    assert not isinstance(x, dict)
    assert x.shape[1:] == (3, 64, 64)
    assert float(x.min()) == pytest.approx(black, abs=1e-5)
    assert float(x.max()) == pytest.approx(white, abs=1e-5)


def test_statistics_of_the_pretrained_cnn_follow_the_new_pictures() -> None:
    network = NETWORKS["efficientnet-lite0"]
    norms = [m for m in network.build().modules() if isinstance(m, nn.BatchNorm2d)]
    epochs = budget_of("efficientnet-lite0", quick=False).epochs
    steps = int(0.7 * epochs * network.sizes.training / network.recipe.batch)
    assert all((1 - (norm.momentum or 0)) ** steps < 0.01 for norm in norms)
