"""One cell of an experiment, and its result on disk under a hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..files import read_json, write_json

__all__ = ["Cell", "code_version", "compute"]

_PACKAGE = Path(__file__).parent.parent
#: What no result depends on.
_WITHOUT = ("cli", "report")


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


@cache
def code_version() -> str:
    """Hash of the package's Python sources that a result can depend on."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        relative = path.relative_to(_PACKAGE)
        if relative.parts[0] not in _WITHOUT:
            digest.update(f"{relative.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compute(
    cells: Iterable[Cell], folder: Path, version: str, run: Callable[[Cell], dict[str, Any]]
) -> Iterator[tuple[Cell, dict[str, Any], bool]]:
    """Run what is missing, in order; each result is on disk before the next cell begins.

    Yields:
        The cell, its result, and whether it was there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        file = cell.file(folder, version)
        if file.exists():
            yield cell, read_json(file)["result"], True
            continue
        result = run(cell)
        write_json(file, {"cell": asdict(cell), "code": version, "result": result})
        yield cell, read_json(file)["result"], False
