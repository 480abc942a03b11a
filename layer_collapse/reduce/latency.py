"""Latency of two forms of one computation, measured in turns so that both see the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer, timer

from ..graph import ExampleInputs, training_mode
from .proof import answer

#: Times two calls against each other: median milliseconds of each.
Stopwatch = Callable[[Callable[[], Any], Callable[[], Any]], tuple[float, float]]


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one evaluation-mode forward pass, before and after."""

    before: float
    after: float
    batch: int
    threads: int

    @property
    def ratio(self) -> float:
        """after / before: below 1 is faster."""
        return self.after / self.before


def in_turns(
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    rounds: int = 9,
    seconds: float = 0.01,
    clock: Callable[[], float] = timer,
) -> tuple[float, float]:
    """Time two calls with the current number of threads, one after the other in every round.

    Args:
        rounds: interleaved rounds; the medians are returned.
        seconds: how long each call is repeated in one round, about.
        clock: reads seconds, after CUDA has finished; ``time.process_time`` where one thread
            works and others disturb it.

    Returns:
        Median milliseconds of one call of each. CUDA is waited for.
    """
    watches: list[Any] = [
        Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads(), timer=clock)
        for call in (first, second)
    ]
    # The first run of each also warms up.
    runs = [max(1, int(seconds / max(watch.timeit(3).mean, 1e-9))) for watch in watches]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for watch, number, found in zip(watches, runs, times, strict=True):
            found.append(watch.timeit(number).mean * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def compare(
    before: nn.Module,
    after: nn.Module,
    inputs: ExampleInputs,
    *,
    rounds: int = 15,
    seconds: float = 0.03,
    clock: Callable[[], float] = timer,
) -> Latency:
    """Time two models on the same inputs in evaluation mode, see :func:`in_turns`.

    Args:
        inputs: a batch for both models, on their device.
    """
    with torch.no_grad(), training_mode(before, False), training_mode(after, False):
        times = in_turns(
            lambda: answer(before, inputs),
            lambda: answer(after, inputs),
            rounds=rounds,
            seconds=seconds,
            clock=clock,
        )
    first = next(t for t in tree_leaves(inputs) if isinstance(t, Tensor))
    return Latency(*times, batch=len(first), threads=torch.get_num_threads())
