"""Kernels as a CUDA graph holds them: what an op launches, replayed on other data.

An op that read the device, that let a kernel read the host, or whose counters were not what they
must be at a second start would give other results than the CPU op.
"""

from __future__ import annotations

import pytest
import torch
from conftest import GEOMETRIES, Kernels
from graph_cases import BAD_SEED, CASES, CPU, Case, assert_replayed, call_pruning, make_selection


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replayed(kernels: Kernels, case: Case) -> None:
    kernels.run_as(GEOMETRIES[len(case.name) % len(GEOMETRIES)])
    given = case.make(0)
    before = [t.clone() for t in given]
    with kernels.capture():
        got = case.call(kernels.ops, given)
    for one, other in zip(given, before, strict=True):  # nothing has run
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    for seed in (1, 2, 3):
        for one, other in zip(given, case.make(seed), strict=True):
            one.copy_(other)
        kernels.replay()
        assert_replayed(case, got, seed)


def test_a_refused_pruning_changes_nothing() -> None:
    """What the replays of a NaN are compared with."""
    tensors = make_selection(BAD_SEED)
    (shares, refused, also), _ = call_pruning(CPU, tensors)
    assert shares.tolist() == [0] * 4
    assert refused[0, 2] == 2
    assert also[:, 0].tolist() == [0] * 4
    assert all(map(torch.equal, tensors[4:], make_selection(BAD_SEED)[4:]))
