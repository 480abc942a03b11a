"""How the settings of continuous are chosen."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layer_collapse.files import read_json
from layer_collapse.paper import tune
from layer_collapse.paper.loops import Part, TrainingLoop
from layer_collapse.removal.settings import DROP, Settings


def _row(settings: Settings, seed: int, accuracy: float, macs: int) -> dict[str, object]:
    own = {"settings": asdict(settings), "seed": seed}
    return own | {"validation_accuracy": accuracy, "macs": macs}


def test_the_smallest_of_those_within_a_point_is_chosen() -> None:
    large, small, worse = (Settings(end=end) for end in (0.6, 0.5, 0.4))
    rows = [
        *(_row(large, seed, 80 + seed, 100) for seed in (0, 1)),
        *(_row(small, seed, 79 + seed, 60) for seed in (0, 1)),
        *(_row(worse, seed, 75 + seed, 10) for seed in (0, 1)),
        *(_row(DROP, seed, 80 + seed, 20) for seed in (0, 1)),
    ]
    best, means = tune.chosen(rows)
    assert best == asdict(small)
    assert [mean["validation_accuracy"] for mean in means] == [80.5, 79.5, 75.5, 80.5]


def test_a_candidate_is_trained_and_seen_on_the_validation_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = replace(tune.DEVELOPMENT["cnn"], epochs=0.2)
    monkeypatch.setitem(tune.DEVELOPMENT, "cnn", short)
    row = tune.tried("cnn", Settings(forms=("constant",)), seed=0)
    assert row["removed"] == 5
    assert 0 < row["validation_accuracy"] <= 100
    assert not row["distillation"]
    whole = 8_523_968  # of the deeper network
    assert 0 < row["macs"] < whole


def test_distilled_targets_are_half_labels_and_half_answers() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 1, 2, 2)
    part = Part(x, (x[:, 0, 0, 0] > 0).long())
    loop = TrainingLoop(part, part, tune.NETWORKS["resnet20"].recipe)

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    targets = tune.distilled(part, build, loop, epochs=3).y
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    assert (targets.gather(1, part.y[:, None]) >= 0.5).all()
    assert ((targets > 0) & (targets < 1)).all()
    student = TrainingLoop(Part(x, targets), part, loop.recipe)
    model = build()
    before = student.loss(model)
    student.train(model, 200)
    assert student.loss(model) < before
    assert student.evaluate(model) > 80


def test_the_study_of_distillation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(cases: list[tuple[Any, ...]], jobs: int) -> list[dict[str, Any]]:
        return [
            {"family": f, "distillation": d, "validation_accuracy": 50.0 + s + 10 * d}
            for f, _, s, d in cases
        ]

    monkeypatch.setattr(tune, "_all_tried", found)
    tune.study_distillation(tmp_path / "d.json", seeds=2, jobs=1)
    assert capsys.readouterr().out.count("50.5 ± 0.7 │ 60.5 ± 0.7") == len(tune.DEVELOPMENT)
    assert len(read_json(tmp_path / "d.json")["runs"]) == 4 * len(tune.DEVELOPMENT)


def test_the_study_of_rivals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(cases: list[tuple[Any, ...]], jobs: int) -> list[dict[str, Any]]:
        return [
            {
                "family": family,
                "settings": tune._described(candidate),
                "validation_accuracy": 50.0 + seed + 10 * isinstance(candidate, Settings),
                "removed": getattr(candidate, "rounds", 4),
            }
            for family, candidate, seed in cases
        ]

    monkeypatch.setattr(tune, "_all_tried", found)
    study, _ = tune.STUDIES["rivals"]
    study(tmp_path / "r.json", 2, 1)
    lines = capsys.readouterr().out.splitlines()
    (eight,) = (line for line in lines if "entropy, 8 rounds of 0.7" in line)
    assert eight.count("50.5 ± 0.7, 8 off") == len(tune.DEVELOPMENT)
    (ours,) = (line for line in lines if "continuous" in line)
    assert ours.count("60.5 ± 0.7, 4 off") == len(tune.DEVELOPMENT)
    assert len(read_json(tmp_path / "r.json")["runs"]) == 2 * (len(tune.RIVALS) + 1) * len(
        tune.DEVELOPMENT
    )


def test_pruning_is_tried_like_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(tune.DEVELOPMENT["cnn"], epochs=0.2)
    monkeypatch.setitem(tune.DEVELOPMENT, "cnn", short)
    row = tune.tried("cnn", tune.RIVALS["entropy, 1 rounds of 0.99"], seed=0)
    assert row["settings"] == {"rounds": 1, "fraction": 0.99}
    assert row["removed"] <= 5
