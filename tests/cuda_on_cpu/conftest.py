"""The CUDA kernels as ops on CPU tensors: :func:`kernels` gives them a schedule and a geometry."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from layer_collapse import _C  # noqa: F401 - registers the ops whose schemas these share

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]

import harness_build as build  # noqa: E402 - stands in this folder

#: (schedule, threads per block): threads and blocks ascending, descending and shuffled
GEOMETRIES = ((0, 256), (1, 64), (5, 128), (9, 256))
_OPS = (
    "rectify",
    "rectify_",
    "layer_entropies",
    "masked_sgd_",
    "masked_adamw_",
    "apply_masks_",
    "magnitude_shares",
    "magnitude_prune_",
)
_libraries: dict[str, torch.library.Library] = {}


class Kernels:
    """``ops.rectify`` and the like run the CUDA kernels; ``run_as`` sets how."""

    def __init__(self, compares_bfloat16: bool) -> None:
        sanitize = bool(os.environ.get("CUDA_ON_CPU_SANITIZE"))
        path = build.ops(compares_bfloat16=compares_bfloat16, sanitize=sanitize)
        name = path.name.rsplit("-", 1)[0]
        library = torch.library.Library(name, "DEF")
        for op in _OPS:
            schema = str(getattr(torch.ops.layer_collapse, op).default._schema)
            library.define(schema.split("::", 1)[1])
        _libraries[name] = library
        torch.ops.load_library(path)
        self.ops: Any = getattr(torch.ops, name)
        self._set = ctypes.CDLL(str(path)).cuda_on_cpu_set
        self.compares_bfloat16 = compares_bfloat16

    def run_as(self, geometry: tuple[int, int]) -> None:
        self._set(*geometry)


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels(compares_bfloat16=True)


@pytest.fixture(scope="session")
def kernels_by_minima() -> Kernels:
    """As compiled for GPUs that cannot compare pairs of bfloat16."""
    return Kernels(compares_bfloat16=False)
