"""Cells: what decides a result, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layer_collapse.paper.cells import Cell, code_version, compute

CELLS = [Cell("net", "entropy", 2, seed, {"epochs": 3}) for seed in range(3)]


def test_an_interrupted_experiment_repeats_nothing(tmp_path: Path) -> None:
    ran: list[int] = []

    def run(cell: Cell) -> dict[str, Any]:
        if cell.seed == 2 and len(ran) == 2:
            ran.append(-1)
            raise KeyboardInterrupt
        ran.append(cell.seed)
        return {"seed": cell.seed}

    with pytest.raises(KeyboardInterrupt):
        list(compute(CELLS, tmp_path, "v", run))
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-written
    found = list(compute(CELLS, tmp_path, "v", run))
    assert ran == [0, 1, -1, 2]
    assert [(r["seed"], known) for _, r, known in found] == [(0, True), (1, True), (2, False)]


def test_every_part_of_the_configuration_and_the_code_decide(tmp_path: Path) -> None:
    others = [
        Cell("other", "entropy", 2, 0, {"epochs": 3}),
        Cell("net", "drop", 2, 0, {"epochs": 3}),
        Cell("net", "entropy", 3, 0, {"epochs": 3}),
        Cell("net", "entropy", 2, 1, {"epochs": 3}),
        Cell("net", "entropy", 2, 0, {"epochs": 4}),
    ]
    keys = {cell.key("v") for cell in [CELLS[0], *others]} | {CELLS[0].key("w")}
    assert len(keys) == 7
    assert code_version() == code_version.__wrapped__()
