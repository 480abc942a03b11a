"""How the settings of continuous are chosen."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from layer_collapse.paper import tune
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
    whole = 8_523_968  # of the deeper network
    assert 0 < row["macs"] < whole
