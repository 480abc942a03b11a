"""The folder of a checkpoint: which files it has, whether they are whole, when it gets its name."""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import check_header, check_text, read_json, sync_folder, write_json
from .tree import DTYPES

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_files",
    "locked",
    "names_of",
    "own_file",
    "publish",
    "read_manifest",
    "remove",
    "sums_of",
]

_VERSION = 1
_MANIFEST = "manifest.json"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process can be; the system gives it free when this one ends or is killed.

    Raises:
        ValueError: another one is.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError if fcntl else AttributeError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    "another run is saving there; give each run a folder of its own"
                ) from error
        yield
    finally:
        with contextlib.suppress(OSError if fcntl else AttributeError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also of copies in forked processes
        os.close(descriptor)


def remove(path: Path) -> None:
    """A folder with all in it; of a link, or a file, just that; nothing is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def names_of(rank: int) -> tuple[str, str]:
    """The files of a process in a checkpoint: its part of the tensors, and its own state."""
    tensors = f"tensors/shard-{rank + 1:05}-model-00001-of-00001.safetensors"  # torch's name for it
    return tensors, f"processes/rank-{rank:05}.safetensors"


def own_file(folder: Path, rank: int) -> Path:
    """The file of a process's own state."""
    return folder / names_of(rank)[1]


def sums_of(folder: Path, rank: int) -> dict[str, list[int]]:
    """Bytes and CRC-32 of the files of a process, as the disk gives them back; 0, 0 if none.

    Raises:
        ValueError: it could not be loaded.
    """
    paths = {name: folder / name for name in names_of(rank)}
    check_header(own_file(folder, rank))
    return {name: _checksum(path) if path.exists() else [0, 0] for name, path in paths.items()}


def publish(manifest: Mapping[str, Any], part: Path, target: Path) -> None:
    """Give a folder that all processes have written to its name, whole or not at all.

    Raises:
        ValueError: it is not what the manifest says.
        OSError: the disk is full, or the like.
    """
    _check_names(part, manifest["files"])
    write_json(part / _MANIFEST, {"version": _VERSION, **manifest})
    _check_manifest(part)
    for folder in (part / "tensors", part / "processes", part):
        sync_folder(folder)
    os.rename(part, target)
    sync_folder(target.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says it holds, every field checked, and that just its files are there.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    if not (folder / _MANIFEST).is_file():
        raise OSError(f"there is no file {_MANIFEST}")
    _check_manifest(folder)
    content = read_json(folder / _MANIFEST)
    fields = {"version", "step", "processes", "state", "tensors", "files"}
    if not isinstance(content, dict) or set(content) != fields:
        raise ValueError(f"its {_MANIFEST} has missing or unknown fields")
    if content["version"] != _VERSION:
        raise ValueError(f"its version is {content['version']!r:.40}, expected {_VERSION}")
    files, tensors, processes = content["files"], content["tensors"], content["processes"]
    fine = (
        type(content["step"]) is int
        and folder.name == f"step-{content['step']:09}"
        and type(processes) is int
        and isinstance(files, dict)
        and 1 <= processes <= len(files)
        and all(_whole(sums, 2) for sums in files.values())
        and {names_of(rank)[1] for rank in range(processes)} <= set(files)
        and isinstance(tensors, dict)
        and all(
            isinstance(t, list)
            and len(t) == 2
            and _whole(t[0])
            and isinstance(t[1], str)
            and t[1] in DTYPES
            for t in tensors.values()
        )
    )
    if not fine:
        raise ValueError(f"its {_MANIFEST} is malformed")
    if odd := sorted(set(files) - {n for rank in range(processes) for n in names_of(rank)}):
        raise ValueError(f"its {_MANIFEST} names {odd[0]!r:.80}")
    _check_names(folder, files)
    return content


def _check_manifest(folder: Path) -> None:
    """Whether there is not too much of it; of files with holes, what is on the disk counts."""
    files = [path.stat() for path in folder.glob("*/*")]
    held = sum(min(f.st_size, 512 * getattr(f, "st_blocks", f.st_size)) for f in files)
    check_text((folder / _MANIFEST).stat().st_size, held)


def _whole(numbers: Any, length: int | None = None) -> bool:
    return (
        isinstance(numbers, list)
        and length in (None, len(numbers))
        and all(type(number) is int and 0 <= number < 2**62 for number in numbers)
    )


def _check_names(folder: Path, files: Mapping[str, Any]) -> None:
    there = {
        f"{part}/{path.name}"
        for part in ("tensors", "processes")
        for path in (folder / part).iterdir()
    }
    if odd := sorted(name for name in there if not (folder / name).is_file()):
        raise ValueError(f"{odd[0]!r:.80} is no file")
    if odd := sorted(there ^ set(files)):
        state = "should not be there" if odd[0] in there else "is missing"
        raise ValueError(
            f"{odd[0]!r:.80} {state}; all processes must see one folder, which nothing else changes"
        )


def check_files(folder: Path, files: Mapping[str, list[int]], mine: int, of: int) -> None:
    """Every ``of``-th file, from number ``mine`` on: whether it is as it was written.

    Raises:
        ValueError: a file is damaged.
        OSError: one cannot be read.
    """
    for name in sorted(files)[mine::of]:
        size = (folder / name).stat().st_size
        if size == files[name][0]:
            size, crc = _checksum(folder / name)
        if size != files[name][0]:
            raise ValueError(f"{name} has {size} bytes instead of {files[name][0]}")
        if crc != files[name][1]:
            raise ValueError(f"{name} is damaged: its checksum is another")


def _checksum(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file, read in pieces."""
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]
