"""Pretrained weights and real data from the package index."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layer_collapse import assets
from layer_collapse.models.efficientnet_lite import efficientnet_lite0
from layer_collapse.models.encoder import minilm
from layer_collapse.text import movie_snippets, trec_questions


def fetched(name: str) -> Path:
    """An asset's folder; without an index the test is skipped, but never in CI."""
    try:
        return assets.fetch(name)
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of efficientnet-lite0.*got 'resnet'"):
        assets.fetch("resnet")


def test_another_package_than_the_pinned_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched("imagenet-20")
    other = dataclasses.replace(assets._ASSETS["imagenet-20"], sha256="0" * 64)
    monkeypatch.setitem(assets._ASSETS, "imagenet-20", other)
    with pytest.raises(OSError, match=r"cannot download foolbox==3\.3\.4"):
        assets.fetch("imagenet-20", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYER_COLLAPSE_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv("LAYER_COLLAPSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / "layer_collapse"


def test_efficientnet_knows_the_pictures() -> None:
    pictures = load_file(fetched("imagenet-20") / "pictures.safetensors")
    assert pictures["x"].shape == (20, 3, 224, 224)
    fetched("efficientnet-lite0")
    with torch.no_grad():
        logits = efficientnet_lite0()(pictures["x"])
    assert int((logits.argmax(1) == pictures["y"]).sum()) == 17
    assert bool((logits.topk(5).indices == pictures["y"][:, None]).any(dim=1).all())


def test_minilm_tells_sentences_apart() -> None:
    """Paraphrases are closer than sentences about other things, padding or not."""
    fetched("movie-snippets")
    from layer_collapse.text import tokenize

    texts = ["a man is eating food", "somebody eats a meal", "the stock market fell today"]
    model = minilm()
    similar = []
    for tokens in (12, 40):
        ids, mask = tokenize(texts, fetched("minilm") / "tokenizer.json", tokens)
        with torch.no_grad():
            meaning = torch.nn.functional.normalize(model(ids, mask), dim=1)
        similar.append(meaning @ meaning.T)
    torch.testing.assert_close(similar[0], similar[1], atol=1e-5, rtol=0)
    assert similar[0][0, 1] > 0.5 > 0.2 > similar[0][0, 2]


def test_movie_snippets_are_balanced_and_padded() -> None:
    fetched("minilm"), fetched("movie-snippets")
    sentences = movie_snippets(tokens=16)
    assert len(sentences) == 9173
    assert 0.45 < float(sentences.y.float().mean()) < 0.55
    assert sentences.ids.shape == sentences.mask.shape == (9173, 16)
    assert bool((sentences.ids[sentences.mask == 0] == 0).all())
    assert bool((sentences.ids[:, 0] == 101).all())  # [CLS]
    batch = sentences.batches(100)[-1]
    assert batch["input_ids"].shape == (73, 16)


def test_trec_questions_come_once_in_six_classes() -> None:
    fetched("trec-questions")
    fetched("minilm")
    questions = trec_questions()
    assert questions.ids.shape == (len(questions), 32)
    assert questions.y.unique().tolist() == list(range(6))
    rows = (assets.fetch("trec-questions") / "questions.txt").read_bytes().splitlines()
    assert 5000 < len(questions) < len(rows)
    assert int(questions.mask.sum(1).min()) >= 3  # a word between two marks
