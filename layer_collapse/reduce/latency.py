"""Latency of two models, measured in turns so that both see the same machine."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..graph import training_mode


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


def compare(
    before: nn.Module, after: nn.Module, inputs: Tensor, *, rounds: int = 15, seconds: float = 0.03
) -> Latency:
    """Time two models on the same inputs, one after the other in every round.

    Args:
        inputs: a batch for both models, on their device.
        rounds: interleaved rounds; the medians are reported.
        seconds: how long each model runs in one round, about.
    """
    threads = torch.get_num_threads()

    def timer(model: nn.Module) -> Any:
        return Timer("model(x)", globals={"model": model, "x": inputs}, num_threads=threads)

    times: dict[str, list[float]] = {"before": [], "after": []}
    with torch.no_grad(), training_mode(before, False), training_mode(after, False):
        timers = {"before": timer(before), "after": timer(after)}
        runs = {}
        for name, one in timers.items():  # also warms up
            runs[name] = max(1, int(seconds / max(one.timeit(3).mean, 1e-9)))
        for _ in range(rounds):
            for name, one in timers.items():
                times[name].append(one.timeit(runs[name]).mean * 1e3)
    return Latency(
        before=statistics.median(times["before"]),
        after=statistics.median(times["after"]),
        batch=len(inputs),
        threads=threads,
    )
