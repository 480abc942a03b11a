"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from layer_collapse.ops import cuda


def _why_not(device: str) -> str:
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if cuda.BUILT else "the extension is built without CUDA"


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the ops run on; the others are skipped by name."""
    if reason := _why_not(request.param):
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture
def cuda_device() -> torch.device:
    """For what only CUDA has."""
    if reason := _why_not("cuda"):
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    """A fixed seed, and one thread: what several threads give is a test of its own."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
