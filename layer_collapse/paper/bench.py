"""Computes the cells of a suite, any number of processes at a time, and reads what is there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .arms import run_cell
from .cells import Cell, compute, result_of
from .networks import NETWORKS, Sizes, Task
from .suites import copied

__all__ = ["Bench", "Listener"]


class Listener(Protocol):
    """Hears how a bench gets on."""

    def begin(self, cell: Cell, number: int) -> None:
        """The cell that comes as ``number``, from 1, is computed now."""
        ...

    def tick(self, epochs: float) -> None:
        """So many of its epochs are trained."""
        ...

    def log(self, line: str) -> None:
        """What its strategy says."""
        ...

    def end(self, cell: Cell, result: dict[str, Any], known: bool) -> None:
        """Its result is on disk; ``known`` where it was before."""
        ...


@dataclass
class Bench:
    """A list of cells and the folder of their results.

    Attributes:
        cells: in the order in which they are computed.
        folder: where results lie, one file each.
        version: of the code, as :func:`layer_collapse.paper.cells.code_version` gives it.
        data_root: folder of Fashion-MNIST, None for the default.
        failures: cells that raised an error, which is a fault of the code; they have no result.
    """

    cells: list[Cell]
    folder: Path
    version: str
    data_root: Path | None = None
    failures: list[tuple[Cell, Exception]] = field(default_factory=list)
    _tasks: dict[tuple[str, Sizes], Task] = field(default_factory=dict, repr=False)

    def run(self, listener: Listener, minutes: float | None = None) -> bool:
        """Compute what is missing; after ``minutes`` no further cell is begun.

        Returns:
            Whether all cells were tried.
        """
        end = None if minutes is None else time.monotonic() + 60 * minutes
        numbers = {id(cell): number for number, cell in enumerate(self.cells, start=1)}

        def run(cell: Cell) -> dict[str, Any] | None:
            gone = None
            if "like" in cell.settings:
                source = result_of(copied(cell), self.folder, self.version)
                if any(copied(cell) == one for one, _ in self.failures):
                    raise RuntimeError(f"{cell.settings['like']}, which it copies, failed")
                if source is None:
                    return None  # another process computes it
                if reason := self._no_architecture(source):
                    return {"n/a": f"{cell.settings['like']} {reason}"}
                gone = {one["name"]: one["kind"] for one in source["removed"]} | source["zero"]
            listener.begin(cell, numbers[id(cell)])
            return run_cell(cell, self._task(cell), gone, listener.log, listener.tick)

        def stop() -> bool:
            return end is not None and time.monotonic() >= end

        def failed(cell: Cell, error: Exception) -> None:
            self.failures.append((cell, error))
            listener.log(f"{cell} failed: {error}")

        done = 0
        found = compute(self.cells, self.folder, self.version, run, stop, failed)
        for cell, result, known in found:
            listener.end(cell, result, known)
            done += 1
        return done + len(self.failures) == len(self.cells)

    def results(self) -> list[tuple[Cell, dict[str, Any]]]:
        """The cells that are there, in order."""
        found = ((cell, result_of(cell, self.folder, self.version)) for cell in self.cells)
        return [(cell, result) for cell, result in found if result is not None]

    @staticmethod
    def _no_architecture(source: dict[str, Any]) -> str:
        if "n/a" in source:
            return "is not applicable here"
        return "cut this network" if source["cut"] else ""

    def _task(self, cell: Cell) -> Task:
        sizes = Sizes(**cell.settings["sizes"])
        key = (cell.network, sizes)
        if key not in self._tasks:
            self._tasks[key] = NETWORKS[cell.network].task(self.data_root, sizes)
        return self._tasks[key]
