"""A run may die anywhere: the same command then ends with the same report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ARGUMENTS = ["run", "--data", "digits", "--train-samples", "64", "--batch", "32", "--epochs", "1"]
ARGUMENTS += ["--rounds", "2", "--fraction", "0.9", "--seed", "3"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

#: Runs the command line in forked children, each of which dies where its line says.
DRIVER = textwrap.dedent(
    """
    import functools, json, os, resource, signal, sys
    import sklearn.datasets
    import torch._dynamo
    from layer_collapse import experiment, training
    from layer_collapse.cli import main
    from layer_collapse.report import canvas, page, plots

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    experiment.compare = functools.partial(experiment.compare, rounds=1, seconds=1e-4)
    canvas.render = lambda draw, report: (b"png", b"<svg/>")
    build = experiment.models.build

    def small(name, *shape, **options):
        if name == "resmlp":
            options = {"width": 16, "hidden": 24, "blocks": 3}
        return build(name, *shape, **options)

    experiment.models.build = small

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def at(count, owner, name, before=True, error=None):
        original, calls = getattr(owner, name), [0]

        def patched(*args, **kwargs):
            calls[0] += 1
            if calls[0] == count and before:
                if error:
                    raise OSError(error, os.strerror(error))
                die()
            result = original(*args, **kwargs)
            if calls[0] == count:
                die()
            return result

        setattr(owner, name, patched)

    POINTS = {
        "step": lambda n: at(n, training.MaskedSGD, "step"),
        "before-rename": lambda n: at(n, os, "replace"),
        "after-rename": lambda n: at(n, os, "replace", before=False),
        "fold": lambda n: at(n, sys.modules["layer_collapse.collapse"], "fold"),
        "report": lambda n: at(n, experiment.report, "write"),
        "full": lambda n: at(n, os, "fsync", error=28),
        "none": lambda n: None,
    }

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            error = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(error, 2)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            POINTS[job["point"]](job["count"])
            os._exit(main(job["argv"]))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
)


class Driver:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )
        self.stderr = ""

    def run(self, out: Path, point: str = "none", count: int = 0, *more: str) -> int:
        assert self.process.stdin
        assert self.process.stdout
        job = {
            "argv": [*ARGUMENTS, "--out", str(out), *more],
            "point": point,
            "count": count,
            "stderr": str(self.folder / "stderr"),
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        self.stderr = (self.folder / "stderr").read_text()
        return code


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    started = Driver(tmp_path_factory.mktemp("driver"))
    yield started
    started.process.stdin.close()
    started.process.wait(30)


def result_of(out: Path) -> dict[str, Any]:
    content = json.loads((out / "report.json").read_text("utf-8"))
    assert content.pop("seconds") > 0
    assert content.pop("latency_ms")["batch"] == 256
    return content


@pytest.fixture(scope="module")
def whole(driver, tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert driver.run(out) == 0
    content = result_of(out)
    assert [step["phase"] for step in content["history"]] == ["dense", "prune", "prune"]
    assert None not in content["accuracy"].values()
    return content | {"files": sorted(p.name for p in out.iterdir())}


STEPS, PHASES = 2, 3  # 64 samples in batches of 32, one epoch; dense and two rounds
RENAMES = 3 * PHASES + 1 + 5  # a state per phase of the run and of both controls, folded, report


def check(driver: Driver, whole: dict[str, Any], out: Path) -> None:
    assert driver.run(out) == 0, driver.stderr
    names = {p.name for p in out.iterdir()}
    strays = names - set(whole["files"])
    assert set(whole["files"]) <= names
    assert all(n.startswith(".") and n.endswith(".tmp") for n in strays)  # hidden, never read
    assert result_of(out) | {"files": whole["files"]} == whole


def test_killed_in_every_phase(driver, whole, tmp_path) -> None:
    """Each life ends in the middle of the phase after the one that it completed."""
    assert driver.run(tmp_path, "step", 2) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    saved = set()
    for _ in range(3 * PHASES - 1):  # of the run, of the dense and of the shallow control
        assert driver.run(tmp_path, "step", STEPS + 2) == -signal.SIGKILL
        saved |= {p.name for p in tmp_path.iterdir()}
        assert not (tmp_path / "report.json").exists()
    controls = {"dense_control.safetensors", "shallow_control.safetensors"}
    assert saved == {"state.safetensors", "folded.safetensors"} | controls
    check(driver, whole, tmp_path)


@pytest.mark.parametrize("point", ["fold", "report"])
def test_killed_while_folding_or_reporting(driver, whole, tmp_path, point) -> None:
    assert driver.run(tmp_path, point, 1) == -signal.SIGKILL
    assert not (tmp_path / "report.json").exists()
    check(driver, whole, tmp_path)


def test_killed_while_a_gate_is_tried(driver, tmp_path) -> None:
    """What `--accept-loss` tries is not kept on disk, and is repeated with equal results."""
    more = ("--accept-loss", "100", "--max-emptied", "0", "--no-controls")
    assert driver.run(tmp_path / "whole", "none", 0, *more) == 0
    expected = result_of(tmp_path / "whole")
    accepted = [step for step in expected["history"] if step["phase"] == "accept"]
    assert len(accepted) >= 2
    out = tmp_path / "killed"
    assert driver.run(out, "step", STEPS * (PHASES + 1) + 2, *more) == -signal.SIGKILL
    assert driver.run(out, "none", 0, *more) == 0
    assert result_of(out) == expected


@pytest.mark.parametrize("point", ["before-rename", "after-rename"])
def test_killed_between_write_and_rename(driver, whole, tmp_path, point) -> None:
    """A life per file: each state in turn, then each file of the report."""
    lives = [1, *[2] * PHASES, *[3] * (2 * PHASES - 1), 2, 4, 6]
    for life, count in enumerate(lives):
        assert driver.run(tmp_path, point, count) == -signal.SIGKILL, life
        strays = [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
        assert len(strays) == (life + 1 if point == "before-rename" else 0)
    check(driver, whole, tmp_path)


def test_every_write_goes_through_a_rename(driver, tmp_path) -> None:
    assert driver.run(tmp_path / "a", "before-rename", RENAMES + 1) == 0
    assert driver.run(tmp_path / "b", "before-rename", RENAMES) == -signal.SIGKILL
    assert not (tmp_path / "b" / "report.html").exists()
    assert (tmp_path / "b" / "report.json").exists()


def test_a_full_disk_is_one_sentence_and_the_old_files_stay(driver, whole, tmp_path) -> None:
    assert driver.run(tmp_path, "step", STEPS * 2 + 1) == -signal.SIGKILL
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"state.safetensors"}
    for count in (1, 3):  # the next state; then (folder syncs count too) one further on
        assert driver.run(tmp_path, "full", count) == 2
        last = driver.stderr.splitlines()[-1]
        assert last.startswith(f"layer-collapse: cannot write {tmp_path}/")
        assert "No space left on device" in last
        assert "Traceback" not in driver.stderr
        after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert not any(name.endswith(".tmp") for name in after)
        if count == 1:
            assert after == before
    check(driver, whole, tmp_path)


def test_a_full_disk_while_the_folded_model_is_written(driver, whole, tmp_path) -> None:
    assert driver.run(tmp_path, "report", 1) == -signal.SIGKILL
    folded = (tmp_path / "folded.safetensors").read_bytes()
    assert driver.run(tmp_path, "full", 1) == 2
    last = driver.stderr.splitlines()[-1]
    assert last.startswith(f"layer-collapse: cannot write {tmp_path}/folded.safetensors: No space")
    assert (tmp_path / "folded.safetensors").read_bytes() == folded
    check(driver, whole, tmp_path)


def test_other_settings_in_the_same_folder_are_refused(driver, whole, tmp_path) -> None:
    assert driver.run(tmp_path, "step", STEPS + 1) == -signal.SIGKILL
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for more, key in (
        (["--seed", "4"], "seed"),
        (["--epochs", "2"], "recipe"),
        (["--model", "mlp"], "model"),
        (["--train-samples", "65"], "train_samples"),
        (["--strategy", "uniform"], "strategy"),
    ):
        assert driver.run(tmp_path, "none", 0, *more) == 2
        (line,) = driver.stderr.splitlines()
        assert f"belongs to a run with other settings ({key}" in line
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_damaged_state_is_refused(driver, tmp_path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"\0" * 100)
    assert driver.run(tmp_path) == 2
    (line,) = driver.stderr.splitlines()
    assert "is damaged" in line
    assert "delete it to start again" in line


def test_the_real_command_killed_from_outside(tmp_path) -> None:
    """Nothing patched: a process of its own, killed after its first phase."""
    command = [sys.executable, "-m", "layer_collapse.cli", *ARGUMENTS, "--no-controls", "--json"]
    whole = subprocess.run(
        [*command, "--out", tmp_path / "whole"], env=ENVIRONMENT, capture_output=True, check=True
    )
    process = subprocess.Popen(
        [*command, "--out", tmp_path / "killed"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state, deadline = tmp_path / "killed" / "state.safetensors", time.monotonic() + 100
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    again = subprocess.run(
        [*command, "--out", tmp_path / "killed"], env=ENVIRONMENT, capture_output=True, check=True
    )
    assert b"resumed after" in again.stderr
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")
    printed = json.loads(whole.stdout)
    assert printed == json.loads((tmp_path / "whole" / "report.json").read_text())
