"""What counting, selection and masked steps cost on a model of a given size, before it is built.

Bytes are those that an op takes or gives, caches not considered. ``tests/distributed/test_plan.py``
measures the same numbers in small runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .measure.rectifiers import RELU
from .ops.magnitude_digits import BUCKETS, digits
from .ops.rectify import HEADER

_COUNT = 8  # bytes of a counter
#: Moments that are kept of every weight, and operations of an update with weight decay.
OPTIMIZERS = {"sgd": (1, 6), "adamw": (2, 14)}


def _of(about: str, **default: Any) -> Any:
    return field(metadata={"help": about}, **default)


@dataclass(frozen=True)
class Job:
    """A model and how it is trained; where no neurons are given, 12 width^2 weights per rectifier.

    Raises:
        ValueError: a number below 1, more masked weights than weights, or an unknown optimiser.
    """

    params: int = _of("weights of the whole model")
    ranks: int = _of("processes", default=1)
    sharded: int = _of("1: every rank holds a part (FSDP2); 0: all of it (DDP)", default=1)
    rectifiers: int = _of("tracked, each fed by one layer whose weight has a mask", default=32)
    neurons: int = _of("of all rectifiers; 0: 4 widths each", default=0)
    masked: int = _of("weights with a mask; 0: neurons x width", default=0)
    positions: int = _of("samples x tokens per step and rank", default=4096)
    weight_bytes: int = _of("of a weight, its gradient and each moment", default=4)
    optimizer: str = _of("sgd or adamw", default="adamw")

    def __post_init__(self) -> None:
        for name in ("params", "ranks", "rectifiers", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be 1 or more (got {getattr(self, name)})")
        width = math.isqrt(self.params // (12 * self.rectifiers))
        object.__setattr__(self, "neurons", self.neurons or 4 * width * self.rectifiers)
        object.__setattr__(self, "masked", self.masked or min(self.params, self.neurons * width))
        if not 0 < self.masked <= self.params or self.neurons < 1:
            raise ValueError(f"plan: masked must lie in 1 to {self.params} (got {self.masked})")
        if self.optimizer not in OPTIMIZERS or self.weight_bytes not in (2, 4, 8):
            raise ValueError(
                "plan: optimizer must be sgd or adamw and weight_bytes 2, 4 or 8 "
                f"(got {self.optimizer} and {self.weight_bytes})"
            )


@dataclass(frozen=True)
class Cost:
    """Of one part, on one rank; "sent" and "steps" are of ring all-reduces between ``ranks``."""

    ranks: int
    memory: int = 0  # bytes that stay, beyond those of an untracked job
    peak: int = 0  # bytes on top while it runs
    moved: int = 0  # bytes read and written; of counting: beyond the rectifier's own
    flops: int = 0  # a comparison or a count is one
    reduced: int = 0  # bytes handed to all-reduce
    calls: int = 0  # of all-reduce

    def to_dict(self) -> dict[str, int]:
        """The numbers by name, with bytes sent and messages in sequence of the rings."""
        sent = math.ceil(2 * self.reduced * (self.ranks - 1) / self.ranks)
        return {**vars(self), "sent": sent, "steps": 2 * self.calls * (self.ranks - 1)}


def costs(job: Job) -> dict[str, Cost]:
    """By part: count and step in every step, entropy and select in every round of pruning."""
    holders = job.ranks if job.sharded else 1
    spread = holders > 1
    params, masked = math.ceil(job.params / holders), math.ceil(job.masked / holders)
    counts = RELU.rows * job.neurons
    ledgers = _COUNT * (HEADER * job.rectifiers + counts)
    words, weights = math.ceil(masked / 8), masked * job.weight_bytes
    # shares() and prune_() read the weights once per digit, where they are spread, else once.
    passes = 2 * digits(job.weight_bytes == 8) if spread else 1
    histograms = _COUNT * BUCKETS * job.rectifiers * spread
    checks = 4 * spread  # numbers of weights alive and of NaN, before either
    summed = _COUNT * (job.rectifiers + counts) * (job.ranks > 1)
    empty = _COUNT * job.rectifiers * spread  # whether a layer has weights left
    moments, operations = OPTIMIZERS[job.optimizer]
    return {
        "count": Cost(job.ranks, ledgers, 0, 2 * ledgers, counts * job.positions),
        "entropy": Cost(
            job.ranks,
            peak=ledgers + 2 * summed,
            reduced=summed + empty,
            calls=(job.ranks > 1) + spread,
        ),
        "select": Cost(
            holders,
            # Counts, totals and sums along the buckets, each with one temporary, and two that the
            # sum over processes may still hold. Not counted: of whole tensors up to a million keys
            # per thread, however many the weights are.
            peak=8 * histograms,
            moved=passes * (weights + words + histograms) + 3 * (weights + words),
            flops=(passes + 1) * masked,
            reduced=passes * histograms + checks * _COUNT * job.rectifiers,
            calls=passes * spread + checks,
        ),
        "step": Cost(
            job.ranks,
            memory=words,
            moved=params * job.weight_bytes * (3 + 2 * moments) + words,
            flops=params * operations,
        ),
    }
