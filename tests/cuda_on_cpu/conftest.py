"""The CUDA kernels as ops on CPU tensors: :func:`kernels` gives them a schedule and a geometry."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from layer_collapse import _C  # noqa: F401 - registers the ops whose schemas these share

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]

import harness_build as build  # noqa: E402 - stands in this folder

#: (schedule, threads per block): threads and blocks ascending, descending and shuffled
GEOMETRIES = ((0, 256), (1, 64), (5, 128), (9, 256), (3, 32))
_OPS = (
    "rectify",
    "rectify_",
    "layer_entropies",
    "masked_sgd_",
    "masked_adamw_",
    "apply_masks_",
    "magnitude_shares",
    "magnitude_prune_",
    "magnitude_prune_.on_device",
    "magnitude_histogram",
)
_libraries: dict[str, torch.library.Library] = {}


class Kernels:
    """``ops.rectify`` and the like run the CUDA kernels; ``run_as`` sets how."""

    def __init__(self, bfloat16: int | None = None) -> None:
        sanitize = bool(os.environ.get("CUDA_ON_CPU_SANITIZE"))
        path = build.ops(bfloat16=bfloat16, sanitize=sanitize)
        name = path.name.rsplit("-", 1)[0]
        library = torch.library.Library(name, "DEF")
        for op in _OPS if bfloat16 is None else _OPS[:2]:
            packet, _, overload = op.partition(".")
            of = getattr(getattr(torch.ops.layer_collapse, packet), overload or "default")
            library.define(str(of._schema).split("::", 1)[1])
        _libraries[name] = library
        torch.ops.load_library(path)
        self.ops: Any = getattr(torch.ops, name)
        self._library = ctypes.CDLL(str(path))

    def run_as(self, geometry: tuple[int, int]) -> None:
        self._library.cuda_on_cpu_set(*geometry)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Kernels do not run: they are kept as a CUDA graph keeps them, for :meth:`replay`.

        Memory that is allocated meanwhile stays, until the next graph is captured.
        """
        self._library.cuda_on_cpu_capture(True)
        try:
            yield
        finally:
            self._library.cuda_on_cpu_capture(False)

    def replay(self) -> None:
        self._library.cuda_on_cpu_replay()


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture(scope="session", params=["sm_75", "sm_80"])
def older_kernels(request: pytest.FixtureRequest) -> Kernels:
    """As compiled for GPUs that do nothing with pairs of bfloat16, or minima and maxima alone."""
    return Kernels(bfloat16=["sm_75", "sm_80"].index(request.param))
