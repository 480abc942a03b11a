"""The fixtures of the cases; the table, and results.json where ``--results`` asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.claims import verdicts
from benchmarks.harness import FULL, QUICK, Bench, combine, renewed
from benchmarks.table import text
from layer_collapse.files import read_json, write_json

ROWS: list[dict[str, Any]] = []
THREADS = [n for n in (1, 2) if n <= (os.cpu_count() or 1)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer cases and rounds, every claim")
    parser.addoption(
        "--repeats",
        type=int,
        default=1,
        help="measure all cases so many times, one pass after the other",
    )
    parser.addoption(
        "--results",
        type=Path,
        help="write the rows to this file; rows there of claims that were not measured stay",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a case that --quick leaves out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    repeats = metafunc.config.getoption("--repeats")
    if repeats < 1:
        raise pytest.UsageError(f"--repeats must be 1 or more (got {repeats})")
    if "turn" in metafunc.fixturenames:  # session scope: the passes follow one another
        metafunc.parametrize("turn", range(repeats), scope="session", ids=lambda n: f"pass-{n + 1}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=THREADS, ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every case runs at each of these, and so does its peer."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def bench(benchmark: Any, threads: int, turn: int, request: pytest.FixtureRequest) -> Bench:
    torch.manual_seed(0)
    effort = QUICK if request.config.getoption("--quick") else FULL
    return Bench(benchmark.pedantic, effort, threads, ROWS)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if not ROWS:
        return
    rows = combine(ROWS)
    terminalreporter.section("ours against peers")
    terminalreporter.write_line(text(rows))
    path = config.getoption("--results")
    if path is None:
        return
    if exitstatus != pytest.ExitCode.OK:
        terminalreporter.write_line(f"{path} was not written: some case failed", red=True)
        return
    try:
        rows = renewed(read_json(path)["rows"] if path.exists() else [], rows)
    except ValueError as error:  # neither what was measured nor what is there may be lost
        terminalreporter.write_line(str(error), red=True)
        path = path.with_stem(f"{path.stem}-here")
    write_json(path, {"claims": verdicts(rows), "rows": rows})
    terminalreporter.write_line(f"written: {path}")
