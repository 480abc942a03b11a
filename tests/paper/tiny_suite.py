"""The command on a network that trains in a second, for tests and for processes that they kill."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from layer_collapse import data, models
from layer_collapse.cli import main
from layer_collapse.paper import suites
from layer_collapse.paper.loops import Part
from layer_collapse.paper.networks import NETWORKS, Network, Sizes, Task
from layer_collapse.report.results import tables
from layer_collapse.training import Recipe

SIZES = Sizes(120, 60, 80, 8)


def _digits(root: Path | None, sizes: Sizes) -> Task:
    found = data.load("digits", train_samples=sizes.training)

    def part(split: data.Split, samples: int) -> Part:
        return Part(split.x[:samples], split.y[:samples])

    return Task(
        part(found.train, sizes.training),
        part(found.validation, sizes.validation),
        part(found.test, sizes.test),
    )


TINY = Network(
    "cnn",
    partial(models.build, "resmlp", (1, 8, 8), 10, width=16, hidden=16, blocks=3),
    "digits",
    _digits,
    Recipe("adamw", lr=5e-3, batch=20),
    SIZES,
)


def install() -> None:
    """Let the quick suite "cnn" hold the tiny network alone, and draw one figure of it."""
    NETWORKS["tiny"] = TINY
    suites.SUITES.clear()
    suites.SUITES["cnn"] = ("tiny",)
    suites._QUICK.clear()
    suites._QUICK["tiny"] = suites.Budget((1,), 2, SIZES)
    tables.FIGURES.clear()
    tables.FIGURES["frontier"] = "accuracy against rectifiers removed"


if __name__ == "__main__":
    install()
    sys.exit(main(["bench-paper", "--suite", "cnn", "--quick", *sys.argv[1:]]))
