"""``bench-paper``: the paper's experiments, cell by cell, and what came out."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ..paper.bench import Bench
from ..paper.cells import Cell, code_version, outcome_of
from ..paper.suites import SUITES, cells
from .console import log, messages, results

_FULL, _QUICK = Path("docs/results"), Path("runs/bench-paper-quick")


def add_command(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "bench-paper",
        help="the paper's experiments on CNNs, vision transformers and language models",
        description="Train every network under every arm (dense, continuous, drop, entropy, "
        "magnitude, shallow), fold, measure; results, tables and figures in the folder of --out. "
        "Each cell's result is kept: the same command goes on after an interruption, and any "
        "number of processes may work on one folder.",
        epilog="example: layer-collapse bench-paper --suite all --quick",
    )
    parser.add_argument("--suite", choices=(*SUITES, "all"), required=True, help="networks")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--quick", action="store_true", help="one network per family, one seed: a smoke test"
    )
    size.add_argument("--full", action="store_true", help="all networks, counts and seeds")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="begin no further cell after M minutes; 0 only draws what is there",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"results; {_FULL}, with --quick {_QUICK}"
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where Fashion-MNIST lies")
    parser.add_argument(
        "--code",
        metavar="HASH",
        help="draw the cells of this version of the code, as their files name it; computes nothing",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        from ..report import results as pages  # before hours of computing
    except ImportError as error:
        raise ImportError(
            f"bench-paper: figures and tables need {error.name}, which is not installed; run "
            "`pip install 'layer-collapse[experiments]'`"
        ) from error
    minutes = arguments.minutes
    if minutes is not None and not 0 <= minutes < math.inf:
        raise ValueError(f"--minutes must be 0 or more (got {minutes})")
    out = arguments.out or (_QUICK if arguments.quick else _FULL)
    folder, version = out / "cells", arguments.code or code_version()
    wanted = cells(arguments.suite, arguments.quick)
    bench = Bench(wanted, folder, version, arguments.data_root)
    if arguments.code is None and minutes != 0:
        with _Progress(wanted) as progress:
            complete = bench.run(progress, minutes)
        if not complete:
            log("time is up; run the same command to go on")
    every = Bench(cells("all", arguments.quick), folder, version)
    found = every.results()
    if not found and (out / "results.json").exists():
        raise ValueError(
            f"{folder} has no cell of code version {version}, so the results in {out} were left as "
            "they are; compute cells, or name with --code the version whose cells are there"
        )
    written = pages.write(out, found, version, arguments.quick)
    results.print(f"{written}", markup=False, soft_wrap=True)
    if bench.failures:
        cell, reason = bench.failures[0]
        raise RuntimeError(
            f"{len(bench.failures)} of {len(wanted)} cells failed and are missing in the tables; "
            f"the first is {cell}: {reason}"
        )
    return 0


class _Progress:
    """A bar for all cells and one for the cell that is computed; one line for each that ends."""

    def __init__(self, wanted: list[Cell]) -> None:
        self.wanted = wanted
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=messages,
            transient=True,
            disable=not messages.is_terminal,
        )
        self.all = self.bars.add_task("cells to compute", total=len(wanted))
        self.now = self.bars.add_task("", total=None, visible=False)
        self.left, self.epochs, self.spent, self.computed = len(wanted), 0.0, 0.0, 0
        self.began = time.monotonic()

    def __enter__(self) -> _Progress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def begin(self, cell: Cell, number: int) -> None:
        """See :class:`layer_collapse.paper.bench.Listener`."""
        self.began, self.epochs = time.monotonic(), float(cell.settings["epochs"])
        title = f"cell {number} of {len(self.wanted)}: {cell}, epoch"
        self.bars.reset(self.now, total=self.epochs, description=title, visible=True)

    def tick(self, epochs: float) -> None:
        """See :class:`layer_collapse.paper.bench.Listener`."""
        self.bars.update(self.now, completed=round(epochs, 1))

    def log(self, line: str) -> None:
        """See :class:`layer_collapse.paper.bench.Listener`."""
        if messages.is_terminal:
            log(line)

    def end(self, cell: Cell, result: dict[str, Any], known: bool) -> None:
        """See :class:`layer_collapse.paper.bench.Listener`."""
        self.left -= 1
        if known:  # the time that is left depends on the others alone
            self.bars.update(self.all, total=self.computed + self.left)
            return
        self.bars.advance(self.all)
        self.computed += 1
        self.spent += time.monotonic() - self.began
        eta = self.spent / self.computed * self.left / 60
        number = len(self.wanted) - self.left
        log(
            f"[{number}/{len(self.wanted)}] {cell}: {outcome_of(result)}, "
            f"{result.get('seconds', 0.0):.0f} s, about {eta:.0f} min left"
        )
