"""The command from end to end: what it writes, and that nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_suite import __file__ as SUITE

from layer_collapse import removal
from layer_collapse.cli import main
from layer_collapse.paper import arms, suites
from layer_collapse.paper.suites import ARMS
from layer_collapse.removal import Loop, NotApplicable, Outcome
from layer_collapse.report.results import BEGIN, END, tables

ROOT = Path(__file__).parents[2]
FIGURES = set(tables.FIGURES)


def bench(out: Path, *more: str) -> int:
    return main(["bench-paper", "--suite", "cnn", "--quick", "--out", str(out), *more])


def start(out: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, SUITE, "--out", str(out)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def cells(out: Path) -> dict[str, tuple[int, bytes]]:
    found = (out / "cells").glob("*.json")
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in found}


def content(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


pytestmark = pytest.mark.timeout(900)  # for machines that do much else


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes computed the suite; one was killed amid a cell."""
    out = tmp_path_factory.mktemp("bench")
    killed, other = start(out), start(out)
    while len(list((out / "cells").glob("*.lock"))) < 2:  # each computes one
        assert killed.poll() is None
        assert other.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=600)[1] for process in (killed, other)]
    assert [killed.returncode, other.returncode] == [-signal.SIGKILL, 0], said
    computed = re.findall(r"^\[\d+/\d+\] (.*?): ", "".join(said), re.MULTILINE)
    assert len(computed) == len(set(computed)) == len(ARMS), said  # none twice, none lost
    return out


@pytest.mark.usefixtures("tiny")
def test_what_is_there_is_not_computed_again(finished: Path) -> None:
    before = cells(finished)
    assert len(before) == len(ARMS)
    assert not list((finished / "cells").glob("*.lock"))
    lost = next(name for name in before if name.startswith("tiny-shallow"))
    (finished / "cells" / lost).unlink()
    assert bench(finished) == 0
    after = cells(finished)
    assert set(after) == set(before)
    assert [name for name in before if before[name] != after[name]] == [lost]


@pytest.mark.usefixtures("tiny")
def test_every_figure_is_written_three_times_with_the_sizes_on_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FIGURES", {key: key for key in FIGURES})
    monkeypatch.setattr(tables, "is_variant", lambda arm: True)
    assert bench(finished, "--minutes", "0") == 0
    for key in [*(f"tiny-{figure}" for figure in FIGURES), "frontier"]:
        svg = (finished / f"{key}.svg").read_text()
        text = " ".join(re.sub(r"<[^>]*>", " ", svg).split())
        assert "120 samples to train on, 60 to validate, 80 to test" in text, key
        assert "prefers-color-scheme:dark" in svg
        for ending, corner in ((".png", (255, 255, 255)), ("-dark.png", (13, 17, 23))):
            with Image.open(finished / f"{key}{ending}") as image:
                assert image.convert("RGB").getpixel((0, 0)) == corner
                assert min(image.size) > 300


def test_the_page_shows_the_numbers_of_the_json(finished: Path) -> None:
    page = (finished / "README.md").read_text()
    network = content(finished)["networks"]["tiny"]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|") and line.count("|") == len(tables._HEAD) + 1
    ]
    head, _, *body = lines
    found = {line[0]: dict(zip(head, line, strict=True)) for line in body}
    assert set(found) == set(ARMS)
    dense = next(row for row in network["rows"] if row["arm"] == "dense")
    for row in network["rows"]:
        shown = found[row["arm"]]
        mean = row["test_accuracy"]["mean"]
        assert shown["test accuracy (%)"] == f"{mean:.1f}"
        assert float(shown["to dense"]) == pytest.approx(
            mean - dense["test_accuracy"]["mean"], abs=0.051
        )
        assert float(shown["off"]) == row["off"]["mean"]
        assert shown["MACs"] == f"{row['macs']:,.0f}"
        assert shown["changed"] == str(row["changed_predictions"]) == "0"
    for row in (row for row in network["rows"] if row["arm"] in ("continuous", "drop")):
        assert row["off"]["mean"] == 1
        assert row["macs"] < network["whole"]["macs"]


def test_json_holds_what_the_cells_say(finished: Path) -> None:
    rows = {row["arm"]: row for row in content(finished)["networks"]["tiny"]["rows"]}
    for _, text in cells(finished).values():
        cell = json.loads(text)
        result, row = cell["result"], rows[cell["cell"]["arm"]]
        assert row["test_accuracy"]["values"] == [result["test_accuracy"]]
        assert row["off"]["values"] == [3 - result["rectifiers_left"]]
        assert result["epochs"] == 2
        assert result["cpu_seconds"] > 0


@pytest.mark.usefixtures("tiny")
def test_drawing_anew_keeps_what_people_wrote(finished: Path) -> None:
    page = finished / "README.md"
    assert bench(finished, "--minutes", "0") == 0
    written = page.read_text().replace("(Not written yet: what", "Mine: | not a table. (What")
    page.write_text(written + "\nAnd below.\n")
    assert bench(finished, "--minutes", "0") == 0
    assert page.read_text() == written + "\nAnd below.\n"
    page.write_text("# without marks\n")
    assert bench(finished, "--minutes", "0") == 2
    assert page.read_text() == "# without marks\n"
    page.write_text(written)


class _Breaks:
    name = "continuous"

    def run(self, model: object, loop: Loop, epochs: float, remove: int) -> Outcome:
        raise RuntimeError("a fault")


class _Refuses:
    name = "continuous"

    def run(self, model: object, loop: Loop, epochs: float, remove: int) -> Outcome:
        raise NotApplicable("continuous: it does not like | this network")


class _Cuts:
    name = "entropy"

    def run(self, model: Any, loop: Loop, epochs: float, remove: int) -> Outcome:
        model.head.weight.data.zero_()
        return Outcome(model, [], epochs)


@pytest.mark.usefixtures("tiny")
def test_what_is_not_applicable_or_cut_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suites, "ARMS", ("dense", "continuous", "entropy", "shallow"))
    changed = {**removal.REMOVALS, "continuous": _Refuses, "entropy": _Cuts}
    monkeypatch.setattr(arms, "REMOVALS", changed)
    assert bench(tmp_path) == 0
    rows = {row["arm"]: row for row in content(tmp_path)["networks"]["tiny"]["rows"]}
    assert rows["continuous"]["not_applicable"] == "continuous: it does not like | this network"
    assert rows["shallow"]["not_applicable"] == "continuous is not applicable here"
    assert rows["entropy"]["cut"] == 1
    for arm in ("continuous", "shallow", "entropy"):
        assert "off" not in rows[arm]
    page = (tmp_path / "README.md").read_text()
    assert "- continuous: n/a, continuous: it does not like | this network" in page
    assert re.search(r"^\| entropy \| 1 \| cut \| - ", page, re.MULTILINE)
    figure = re.sub(r"<[^>]*>", " ", (tmp_path / "tiny-frontier.svg").read_text())
    assert "continuous: n/a" in figure
    assert "entropy: cut" in figure
    assert "n/a (continuous: it does not like" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_fault_in_one_cell_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suites, "ARMS", ("continuous", "shallow", "dense"))
    monkeypatch.setattr(arms, "REMOVALS", {**removal.REMOVALS, "continuous": _Breaks})
    assert bench(tmp_path) == 2
    said = capsys.readouterr().err
    assert "2 of 3 cells failed" in said
    assert "continuous, 1 to remove, seed 0: a fault" in said
    assert [row["arm"] for row in content(tmp_path)["networks"]["tiny"]["rows"]] == ["dense"]


@pytest.mark.usefixtures("tiny")
def test_no_time_and_no_cells_still_give_a_page(tmp_path: Path) -> None:
    assert bench(tmp_path, "--minutes", "0") == 0
    assert content(tmp_path)["networks"] == {}
    page = (tmp_path / "README.md").read_text()
    assert page.index("## Reading") < page.index(BEGIN) < page.index(END)


def test_results_whose_cells_are_gone_are_left_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("README.md", "results.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    assert bench(tmp_path, "--minutes", "0") == 2
    assert "has no cell of code version" in capsys.readouterr().err
    for name in ("README.md", "results.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("minutes", ["-1", "nan", "inf"])
def test_bad_minutes_get_a_sentence(
    tmp_path: Path, minutes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, f"--minutes={minutes}") == 2
    assert "--minutes must be 0 or more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
