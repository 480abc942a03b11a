"""Files that are either written whole or not touched: every artefact of a run goes through here."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

__all__ = [
    "check_header",
    "check_text",
    "read_json",
    "sync_folder",
    "to_json",
    "write_atomically",
    "write_json",
]


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old content or the new, never a part.

    The data goes to a temporary file in the same folder, is flushed to the disk and takes the
    final name in one rename. Text is written as UTF-8 with its line ends unchanged.

    Args:
        path: file to create or replace; its folder must exist.
        data: the whole new content.

    Raises:
        OSError: the file cannot be written (missing folder, no permission, disk full); ``path``
            is as it was before and the temporary file is gone.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    # Hidden, so that a glob for *.json never meets it; random, so that two writers never share it.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        # Mode "x" keeps the permissions that the umask grants; tempfile would make it private.
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # also KeyboardInterrupt: leave no temporary behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(
                f"cannot write {path}: {error.strerror or error}; nothing was overwritten, "
                "make the folder writable with free space and run again"
            ) from error
        raise
    sync_folder(path.parent)


#: Bytes of JSON that a file may hold however small its tensors are.
_TEXT = 4 << 20


def check_text(length: int, tensors: int) -> None:
    """Whether JSON of so many bytes may go with so many bytes of tensors.

    Parsed JSON can take 20 times its length; this keeps a file from taking much more than it has.

    Raises:
        ValueError: it is more than 4 MiB and a 64th of the tensors.
    """
    most = _TEXT + tensors // 64
    if length > most:
        raise ValueError(f"it has {length} bytes of JSON; expected at most {most}")


def check_header(path: Path) -> None:
    """Whether the header of a safetensors file is in the file and not larger than it should be.

    Raises:
        ValueError: it is not.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header of {length} bytes is not in its {size}")
    check_text(length, size - 8 - length)


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside survive a power cut, where the file system can do that.

    The new content is already in place, so a file system (or Windows) that refuses to sync a
    folder is no failure of the write.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_json(obj: Any) -> str:
    """Return ``obj`` as strict JSON text: insertion order, indent 1, non-finite floats as null.

    Raises:
        TypeError: ``obj`` holds something that JSON has no form for (a tensor, a path).
    """
    try:
        return json.dumps(_finite(obj), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except TypeError as error:
        raise TypeError(
            "to_json: expected dicts, lists, strings, numbers, booleans and None "
            f"({error}); convert the value first"
        ) from error


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` to ``path`` as :func:`to_json` gives it, atomically.

    Raises:
        TypeError: as :func:`to_json`; nothing was written.
        OSError: as :func:`write_atomically`.
    """
    write_atomically(path, to_json(obj))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a strict JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        ValueError: the content is not strict JSON in UTF-8 (NaN and Infinity are refused).
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"expected a JSON file at {path}, but there is none") from error
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected JSON in {path} ({error!s:.300}); write the file again"
        ) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(obj: Any) -> Any:
    """Copy ``obj`` with NaN and the infinities replaced by None."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(value) for value in obj]
    return obj
