"""Fashion-MNIST's idx files: find them, read them, believe nothing that their headers declare."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Labels", "Pixels", "find_fashion_mnist", "read_pair"]

Pixels = npt.NDArray[np.uint8]  # [N, height, width]
Labels = npt.NDArray[np.int64]  # [N]

_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801  # idx magic: 08 = unsigned byte, then the rank
_HINT = (
    "install it with `apt-get install dataset-fashion-mnist` or name its folder with --data-root"
)


def find_fashion_mnist(root: Path) -> dict[str, Path]:
    """Map the four idx names to files of one folder, ``root`` or torchvision's below it."""
    if not root.is_dir():
        raise FileNotFoundError(f"data: expected Fashion-MNIST in {root}, no such folder; {_HINT}")
    stems = [
        f"{part}-{what}-ubyte"
        for part in ("train", "t10k")
        for what in ("images-idx3", "labels-idx1")
    ]
    missing: list[str] = []
    for folder in (root, root / "FashionMNIST" / "raw"):
        candidates = {stem: (folder / stem, folder / f"{stem}.gz") for stem in stems}
        found = {
            stem: next(path for path in paths if path.is_file())
            for stem, paths in candidates.items()
            if any(path.is_file() for path in paths)
        }
        if len(found) == len(stems):
            return found
        if found or not missing:  # report the folder that holds some of them
            missing = [str(folder / stem) for stem in stems if stem not in found]
    raise FileNotFoundError(
        f"data: expected the Fashion-MNIST files {', '.join(missing)} (raw or .gz), "
        f"but they are missing; {_HINT}"
    )


def read_pair(images: Path, labels: Path) -> tuple[Pixels, Labels]:
    """Read images uint8 [N, 28, 28] and labels [N] and check that they belong together."""
    x = _read_idx(images, _IDX_IMAGES)
    y = _read_idx(labels, _IDX_LABELS)
    if x.shape[1:] != (28, 28):
        raise ValueError(f"data: expected images of 28 x 28 in {images} (got {x.shape[1:]})")
    if len(x) != len(y) or not len(y):
        raise ValueError(
            f"data: expected as many labels as images, at least one (got {len(x)} images in "
            f"{images} and {len(y)} labels in {labels})"
        )
    if y.max() > 9:
        raise ValueError(f"data: expected labels from 0 to 9 in {labels} (got {y.max()})")
    return x, y.astype(np.int64)


def _read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """Read one idx file of unsigned bytes, gzipped if its name ends in .gz."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"data: cannot read {path}: {error.strerror or error}") from error
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"data: expected a whole gzip file at {path} ({error}); fetch it again"
            ) from error
    rank = magic & 0xFF
    header = 4 + 4 * rank
    got = int.from_bytes(content[:4], "big")
    if len(content) < header or got != magic:
        raise ValueError(
            f"data: expected an idx file with magic 0x{magic:08x} and {header} bytes of header at "
            f"{path} (got 0x{got:08x} and {len(content)} bytes)"
        )
    shape = struct.unpack(f">{rank}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"data: expected {math.prod(shape)} bytes of data in {path}, as its header declares "
            f"(got {len(content) - header}); fetch the file again"
        )
    # A copy, because torch wants memory that it may write to.
    data: npt.NDArray[np.uint8] = np.frombuffer(content, dtype=np.uint8, offset=header).copy()
    return data.reshape(shape)
