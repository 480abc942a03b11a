"""Where nvcc and nvdisasm are."""

from __future__ import annotations

import os
import shutil
import site
from pathlib import Path

#: Where the toolkit installs itself.
HOME = Path("/usr/local/cuda")


def _candidates(name: str) -> list[Path]:
    found = [Path(path) for path in (shutil.which(name),) if path]
    for home in (os.environ.get("CUDA_HOME"), HOME):
        if home:
            found.append(Path(home) / "bin" / name)
    # the wheels of nvidia-cuda-nvcc and nvidia-cuda-nvdisasm
    for folder in site.getsitepackages():
        found += sorted(Path(folder).glob(f"nvidia/cu*/bin/{name}"))
    return [path for path in found if path.is_file() and os.access(path, os.X_OK)]


def nvcc() -> Path | None:
    return next(iter(_candidates("nvcc")), None)


def nvdisasm() -> Path | None:
    return next(iter(_candidates("nvdisasm")), None)
