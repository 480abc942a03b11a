"""Ratios against a peer: both are run in turns, so that they see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

ROWS: list[tuple[str, str, str, float, float]] = []


@pytest.fixture
def against(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float]:
    """``against(ours, peer, name)``: median time of ours over median time of the peer."""

    def measure(ours: Callable[[], Any], peer: Callable[[], Any], name: str) -> float:
        times: list[float] = []

        def run_peer() -> None:  # pytest-benchmark calls it before each round of ours
            start = time.perf_counter()
            peer()
            times.append(time.perf_counter() - start)

        for _ in range(3):
            ours(), peer()
        benchmark.pedantic(ours, setup=run_peer, rounds=51, iterations=1)
        mine, theirs = benchmark.stats.stats.median, statistics.median(times)
        benchmark.extra_info |= {"peer": name, "ratio": mine / theirs}
        ROWS.append((request.node.name, name, f"{torch.get_num_threads()}", mine, theirs))
        return mine / theirs

    return measure


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("ratios (below 1: faster than the peer)")
    for case, peer, threads, mine, theirs in ROWS:
        terminalreporter.write_line(
            f"{case:<58} {mine * 1e3:9.3f} ms  {peer:<24} {theirs * 1e3:9.3f} ms  "
            f"ratio {mine / theirs:5.2f}  ({threads} threads)"
        )
