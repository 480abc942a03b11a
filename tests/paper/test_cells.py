"""Cells: what decides a result, and going on after an interruption."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from layer_collapse.files import write_json
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
    assert len(list(tmp_path.glob("*.json"))) == 2  # nothing half-written
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


def test_a_cell_that_another_process_holds_is_taken_when_it_is_free(tmp_path: Path) -> None:
    ran: list[int] = []
    other = FileLock(CELLS[1].file(tmp_path, "v").with_suffix(".lock"), thread_local=False)
    other.acquire()

    def run(cell: Cell) -> dict[str, Any] | None:
        ran.append(cell.seed)
        if cell.seed == 2 and ran.count(2) == 1:
            other.release()
            return None  # needs what the other process computes
        return {"seed": cell.seed}

    found = list(compute(CELLS, tmp_path, "v", run, pause=0.0))
    assert ran == [0, 2, 1, 2]
    assert [r["seed"] for _, r, _ in found] == [0, 1, 2]
    assert not list(tmp_path.glob("*.lock"))


def test_a_result_that_appears_while_waiting_for_the_lock_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = CELLS[0].file(tmp_path, "v")

    class Late(FileLock):
        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            write_json(written, {"result": {"by": "the other"}})
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr("layer_collapse.paper.cells.FileLock", Late)
    ((_, result, known),) = compute(CELLS[:1], tmp_path, "v", lambda cell: {"by": "me"})
    assert (result, known) == ({"by": "the other"}, True)


def test_no_cell_begins_once_time_is_up(tmp_path: Path) -> None:
    ran: list[int] = []

    def run(cell: Cell) -> dict[str, Any]:
        ran.append(cell.seed)
        return {}

    assert len(list(compute(CELLS, tmp_path, "v", run, lambda: len(ran) == 2))) == 2
    assert ran == [0, 1]


def test_what_computes_decides_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layer_collapse.paper.cells._PACKAGE", tmp_path)
    for path in ("prune/a.py", "cli/b.py", "report/results/c.py", "paper/suites.py", "d.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    library = tmp_path / f"_C{EXTENSION_SUFFIXES[0]}"
    library.write_bytes(b"1")
    version = code_version.__wrapped__
    first = version()
    for path in ("cli/b.py", "report/results/c.py", "paper/suites.py", "d.txt"):
        (tmp_path / path).write_text("changed")
    assert version() == first
    library.write_bytes(b"2")
    assert version() != first
    library.write_bytes(b"1")
    (tmp_path / "prune/a.py").write_text("changed")
    assert version() != first
    (tmp_path / "prune/a.py").write_text("")
    monkeypatch.setattr("torch.__version__", "0.0")
    assert version() != first
