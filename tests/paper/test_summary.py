"""Cells become rows: numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from layer_collapse.paper.cells import Cell
from layer_collapse.report.results import charts, layers, tables
from layer_collapse.report.results.summary import _ranks, summary

SETTINGS = {"epochs": 8, "sizes": {"training": 10, "validation": 5, "test": 7, "side": 28}}


def _cell(arm: str, remove: int, seed: int) -> Cell:
    return Cell("resnet20", arm, remove, seed, SETTINGS)


def _result(left: int, accuracy: float, **more: Any) -> dict[str, Any]:
    size = {"depth": 20, "parameters": 100, "rectifiers": left, "macs": 1000}
    return {
        "network": {"depth": 20, "parameters": 200, "rectifiers": 19, "macs": 2000},
        "cut": "",
        "note": "",
        "removed": [{"name": "a", "kind": "constant", "epoch": 1.0}],
        "zero": {"a": "empty", "b": "one-sided"},
        "layers": [],
        "entropy_history": [],
        "validation_accuracy": accuracy + 1,
        "test_accuracy": accuracy,
        "changed_predictions": 0,
        "rectifiers_left": left,
        "after": size,
        "proof": {"max_rel": 1e-7},
        "latency_ms": {"1": {"before": 4.0, "after": 2.0}, "64": {"before": 8.0, "after": 6.0}},
        "cpu_seconds": 30.0,
        **more,
    }


def test_rows_are_means_over_the_seeds_of_what_is_whole() -> None:
    cut = {"network": {"rectifiers": 19}, "cut": "all equal", "note": "", "cpu_seconds": 30.0}
    found = summary(
        [
            (_cell("drop", 3, 0), _result(16, 80.0)),
            (_cell("drop", 3, 1), _result(15, 84.0)),
            (_cell("drop", 3, 2), cut),
            (_cell("tlc", 3, 0), {"n/a": "no batch norm"}),
        ]
    )["resnet20"]
    drop, tlc = found["rows"]
    assert drop["off"]["mean"] == 3.5
    assert drop["off"]["values"] == [3, 4]
    assert drop["test_accuracy"]["mean"] == 82.0
    assert drop["test_accuracy"]["deviation"] == pytest.approx(8**0.5)
    assert drop["by_seed"]["1"] == {"test": 84.0, "validation": 85.0, "off": 4}
    assert (drop["seeds"], drop["whole"], drop["cut"]) == (3, 2, 1)
    assert (drop["empty"], drop["one_sided"], drop["kinds"]) == (1, 1, {"constant": 1})
    assert drop["latency"]["1"]["ratio"]["mean"] == 0.5
    assert drop["latency"]["64"]["ratio"]["mean"] == 0.75
    assert tlc["not_applicable"] == "no batch norm"
    assert "off" not in tlc
    assert found["cpu_minutes"] == 1.5
    assert "10 samples to train on" in found["about"]


def test_ranks_share_ties_as_scipy_does() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, 50).astype(float), generator.integers(0, 9, 50).astype(float)
    ours = np.corrcoef(_ranks(x), _ranks(y))[0, 1]
    assert ours == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_the_correlation_takes_every_layer_and_measurement() -> None:
    history = [
        {"rectifiers": {"a": {"H": 0.9, "sparsity": 0.0}, "b": {"H": 0.8, "sparsity": 0.5}}},
        {"rectifiers": {"a": {"H": 0.0, "sparsity": 1.0}, "b": {"H": None, "sparsity": 0.2}}},
    ]
    found = summary([(_cell("magnitude", 3, 0), _result(16, 80.0, entropy_history=history))])
    # of "a" alone: -1; "b" has one pair
    expected = {"rho": -1.0, "points": 3, "within": -1.0, "layers": 1}
    pruned = found["resnet20"]["correlation"]["magnitude"]
    assert {key: pruned[key] for key in expected} == pytest.approx(expected)
    assert list(pruned["bands"].values()) == [0.9, 0.8, None, None, None, 0.0]
    assert "| resnet20 | 0.90 | 0.80 | - | - | - | 0.00 |" in tables._correlations(found)
    levels = [  # together entropy rises with sparsity, in each layer it falls
        {"rectifiers": {"a": {"H": 0.3, "sparsity": 0.1}, "b": {"H": 0.9, "sparsity": 0.8}}},
        {"rectifiers": {"a": {"H": 0.2, "sparsity": 0.2}, "b": {"H": 0.8, "sparsity": 0.9}}},
    ]
    apart = summary([(_cell("magnitude", 3, 0), _result(16, 80.0, entropy_history=levels))])
    apart = apart["resnet20"]["correlation"]["magnitude"]
    assert (apart["within"], apart["layers"]) == (pytest.approx(-1.0), 2)
    assert apart["rho"] > 0
    still = summary([(_cell("dense", 0, 0), _result(19, 80.0, entropy_history=history[:0]))])
    assert still["resnet20"]["correlation"]["dense"] is None


def _rows(*cells: tuple[str, int, int, float]) -> dict[str, Any]:
    return summary([(_cell(arm, asked, seed), _result(16, a)) for arm, asked, seed, a in cells])


def test_differences_are_of_the_same_seed_and_count() -> None:
    found = _rows(
        ("continuous", 3, 0, 82.0),
        ("continuous", 3, 1, 84.0),
        ("continuous", 3, 2, 83.0),
        ("continuous", 5, 0, 70.0),
        ("drop", 3, 0, 81.0),
        ("drop", 3, 1, 82.0),
        ("drop", 3, 2, 82.0),
        ("entropy", 3, 1, 86.5),
        ("entropy", 3, 3, 10.0),  # of a seed that continuous does not have
        ("shallow", 3, 0, 82.0),
        ("shallow", 3, 1, 83.0),
        ("shallow", 3, 2, 82.0),
        ("continuous-0.7", 3, 1, 86.5),
        ("continuous-0.33", 3, 1, 80.5),
    )
    lines = tables._against(found).splitlines()
    # 1, 2, 1: t = 4; 0, 1, 1: t = 2; a t of 4.303 is needed
    assert lines[-2] == (
        "| resnet20 | 3 | -2.5 (1) | - | - | +1.3 ± 0.6 (3) | +0.7 ± 0.6 (3) "
        "| +0.0 (1) | -6.0 (1) |"
    )
    assert lines[-1] == "| resnet20 | 5 | - | - | - | - | - | - | - |"
    sure = _rows(
        *(("continuous", 3, seed, 80.0 + seed) for seed in range(3)),
        *(("drop", 3, seed, 78.0 + seed + 0.1 * (seed == 0)) for seed in range(3)),
    )
    assert "| **+2.0 ± 0.1** (3) |" in tables._against(sure)
    both = [
        (_cell("continuous", 3, 0), _result(16, 80.0)),
        (_cell("magnitude", 3, 0), _result(18, 85.0)),
    ]
    assert "| -5.0 (1; 1 off) |" in tables._against(summary(both))
    both[1] = (_cell("magnitude", 3, 0), _result(12, 85.0))
    assert "| -5.0 (1; 7 off) |" in tables._against(summary(both))


def test_the_count_within_a_point_is_chosen_on_the_validation_split() -> None:
    found = summary(
        [
            (_cell("dense", 0, 0), _result(19, 80.0)),  # validation 81
            (_cell("dense", 0, 1), _result(19, 90.0)),
            (_cell("drop", 3, 0), _result(16, 70.0, validation_accuracy=80.5)),
            (_cell("drop", 5, 0), _result(14, 80.0, validation_accuracy=79.5)),
            (_cell("entropy", 3, 2), _result(16, 80.0)),  # a seed that dense has not
        ]
    )
    assert _lines(tables._within(found)) == [
        "| resnet20 | 5 | - | 3 (-10.0) | - | - | - |",
        "| resnet20 | - | 50 % (-10.0) | - | - | - |",
    ]


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| resnet20")]


def test_exactly_a_point_is_within_a_point() -> None:
    dense, entropy = (83.2, 83.4), (82.3, 82.3)  # on average 1 point, in floats a little more
    assert sum(e - d for d, e in zip(dense, entropy, strict=True)) / 2 < -1.0
    cells = [
        (_cell(arm, asked, seed), _result(19 - asked, 80.0, validation_accuracy=accuracies[seed]))
        for arm, asked, accuracies in (("dense", 0, dense), ("entropy", 5, entropy))
        for seed in range(2)
    ]
    assert (
        _lines(tables._within(summary(cells)))[0] == "| resnet20 | 5 | - | - | 5 (+0.0) | - | - |"
    )


def test_a_shallow_network_counts_as_what_it_copies() -> None:
    found = summary(
        [
            (_cell("dense", 0, 0), _result(19, 80.0)),
            (_cell("shallow", 5, 0), _result(12, 80.0)),  # two more stood behind dead branches
            (_cell("magnitude", 5, 0), _result(17, 80.0)),
        ]
    )
    assert _lines(tables._within(found))[0] == "| resnet20 | 5 | - | - | - | 2 (+0.0) | 5 (+0.0) |"


def test_arms_that_train_equally_long_are_named_together() -> None:
    assert tables._by_epochs({"dense": 8}) == {"dense": 8}
    assert tables._by_epochs({"dense": 8, "drop": 8}) == {"all arms": 8}
    mixed = tables._by_epochs({"dense": 8, "short": 2, "drop": 8})
    assert list(mixed.items()) == [("short", 2), ("all other arms", 8)]


def test_a_seed_without_a_result_is_told() -> None:
    found = summary(
        [
            (_cell("drop", 3, 0), _result(16, 80.0)),
            (_cell("drop", 3, 1), {"n/a": "the training loss is nan"}),
        ]
    )["resnet20"]
    (row,) = found["rows"]
    assert tables._line(row, {})[-1] == "1 of 2"


def test_equal_notes_are_one_line() -> None:
    found = summary(
        [
            (_cell("shallow", 3, 0), _result(16, 80.0, note="that of continuous")),
            (_cell("shallow", 3, 1), _result(16, 80.0, note="that of continuous")),
            (_cell("shallow", 5, 0), _result(14, 80.0, note="that of continuous")),
            (_cell("magnitude", 5, 0), _result(17, 80.0, note="2 of 5")),
            (_cell("tlc", 3, 0), {"n/a": "no batch norm"}),
            (_cell("tlc", 5, 0), {"n/a": "no batch norm"}),
        ]
    )["resnet20"]
    assert tables._notes(found["rows"]) == [
        "- tlc: n/a, no batch norm",
        "- shallow, 3 and 5 asked: that of continuous",
        "- magnitude, 5 asked: 2 of 5",
    ]


def test_variants_have_a_figure_of_their_own_where_some_were_run() -> None:
    plain = _rows(("continuous", 3, 0, 82.0), ("continuous-0.7", 3, 0, 80.0))["resnet20"]
    assert "ablations" not in tables.figures_of(plain)
    more = _rows(("continuous", 3, 0, 82.0), ("continuous-loss", 3, 0, 80.0))["resnet20"]
    assert "ablations" in tables.figures_of(more)
    (axes,) = charts.CHARTS["ablations"]("resnet20", more).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["continuous (3 off, 1 seed)", "continuous-loss (3 off, 1 seed)"]
    (axes,) = charts.CHARTS["frontier"]("resnet20", more).axes
    assert axes.get_legend_handles_labels()[1] == ["continuous"]


def test_the_axis_ends_twenty_points_under_dense_and_says_what_is_below() -> None:
    near = _rows(("dense", 0, 0, 80.0), ("drop", 3, 0, 70.0))["resnet20"]
    (axes,) = charts.CHARTS["frontier"]("resnet20", near).axes
    assert not axes.texts
    far = _rows(("dense", 0, 0, 80.0), ("drop", 3, 0, 70.0), ("entropy", 3, 0, 17.4))["resnet20"]
    (axes,) = charts.CHARTS["frontier"]("resnet20", far).axes
    assert axes.get_ylim()[0] == 60.0
    assert [text.get_text() for text in axes.texts] == ["1 below, down to 17 %"]


def test_the_final_scan_stands_for_the_last_measurement() -> None:
    trained = [{"epoch": epoch, "rectifiers": {"a": {"H": 0.5}}} for epoch in (0.0, 1.0, 2.0)]
    scanned = {"epoch": 2.0, "rectifiers": {"a": {"H": 0.0}}}
    shown = layers._last_of_each_epoch([*trained, scanned])
    assert [one["rectifiers"]["a"]["H"] for one in shown] == [0.5, 0.5, 0.0]
    assert 0 < shown[0]["epoch"] < shown[1]["epoch"] < shown[2]["epoch"]  # columns have a width
