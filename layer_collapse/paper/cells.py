"""One cell of an experiment, and its result on disk under a hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..files import read_json, write_json

__all__ = ["Cell", "code_version", "compute", "outcome_of", "rectifiers_off", "result_of"]

_PACKAGE = Path(__file__).parent.parent
#: What no result depends on; the plan of cells only says which there are.
_WITHOUT = ("cli/", "report/", "integrations/", "resume/", "paper/suites.py", "paper/tune.py")


@dataclass(frozen=True)
class Cell:
    """One network under one arm, asked for ``remove`` rectifiers, with one seed.

    ``settings`` is all else that decides the result, as JSON data: sizes, epochs, recipe.
    """

    network: str
    arm: str
    remove: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)

    def key(self, version: str) -> str:
        """Hash of the configuration and of the code version, 16 hexadecimal digits."""
        text = json.dumps([asdict(self), version], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def file(self, folder: Path, version: str) -> Path:
        """Where its result lies."""
        name = f"{self.network}-{self.arm}-{self.remove}-{self.seed}-{self.key(version)}.json"
        return folder / name

    def __str__(self) -> str:
        asked = f", {self.remove} to remove" if self.remove else ""
        return f"{self.network} {self.arm}{asked}, seed {self.seed}"


@cache
def code_version() -> str:
    """Hash of what computes: the package's Python sources, its compiled library, torch's version.

    A library that was compiled anew from equal sources by the same compiler has the same bytes.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(_PACKAGE.rglob("*")):
        relative = path.relative_to(_PACKAGE).as_posix()
        compiled = any(path.name.endswith(suffix) for suffix in EXTENSION_SUFFIXES)
        if (path.suffix == ".py" or compiled) and not relative.startswith(_WITHOUT):
            digest.update(f"{relative}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def result_of(cell: Cell, folder: Path, version: str) -> dict[str, Any] | None:
    """The result on disk, None where there is none yet."""
    file = cell.file(folder, version)
    return read_json(file)["result"] if file.exists() else None


def compute(
    cells: Iterable[Cell],
    folder: Path,
    version: str,
    run: Callable[[Cell], dict[str, Any] | None],
    stop: Callable[[], bool] = lambda: False,
    failed: Callable[[Cell, Exception], None] | None = None,
    pause: float = 1.0,
) -> Iterator[tuple[Cell, dict[str, Any], bool]]:
    """Run what is missing, in order; each result is on disk before the next cell begins.

    Any number of processes may share a folder: each cell is locked while it is computed, and the
    lock of a process that is killed is free again. A cell that another process holds, or that
    ``run`` answers with None because it needs such a one, is tried again after the others.

    Args:
        stop: asked before each cell.
        failed: told of a cell that raises RuntimeError or ValueError, which is left out then;
            without it, the error is raised.
        pause: seconds between two rounds of trying.

    Yields:
        The cell, its result, and whether it was there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = list(cells)
    while waiting:
        later = []
        for cell in waiting:
            if stop():
                return
            try:
                found = _locked(cell, folder, version, run)
            except (RuntimeError, ValueError) as error:
                if failed is None:
                    raise
                failed(cell, error)
                continue
            if found is None:
                later.append(cell)
            else:
                yield cell, *found
        waiting = later
        if waiting:
            time.sleep(pause)


def _locked(
    cell: Cell, folder: Path, version: str, run: Callable[[Cell], dict[str, Any] | None]
) -> tuple[dict[str, Any], bool] | None:
    """Compute a cell unless another process does; None where it is not there yet."""
    if (known := result_of(cell, folder, version)) is not None:
        return known, True
    file = cell.file(folder, version)
    lock = file.with_suffix(".lock")
    try:
        with FileLock(lock, blocking=False):
            if (known := result_of(cell, folder, version)) is not None:
                return known, True  # by who held the lock until now
            result = run(cell)
            if result is None:
                return None
            write_json(file, {"cell": asdict(cell), "code": version, "result": result})
            # The result lies there, so who opened this lock before computes nothing.
            lock.unlink(missing_ok=True)
        return read_json(file)["result"], False
    except Timeout:
        return None


def rectifiers_off(result: dict[str, Any]) -> int:
    """How many rectifiers of the whole network its folded form has not."""
    return int(result["network"]["rectifiers"]) - int(result["rectifiers_left"])


def outcome_of(result: dict[str, Any]) -> str:
    """What became of a cell, in a few words."""
    if "n/a" in result:
        return f"n/a ({result['n/a']})"
    if result["cut"]:
        return f"cut ({result['cut']})"
    return (
        f"{rectifiers_off(result)} of {result['network']['rectifiers']} rectifiers off, "
        f"{result['test_accuracy']:.1f} % on the test set"
    )
