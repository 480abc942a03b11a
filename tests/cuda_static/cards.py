"""What cards could do with a kernel, from its instructions and bytes: a model, nothing measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Published figures: multiprocessors, boost clock (GHz), memory bandwidth (GB/s)."""

    name: str
    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float

    def issue_limited(self, instructions: float, bytes_moved: int) -> float:
        """GB/s if nothing but issuing mattered: 4 warps of 32 lanes per cycle and multiprocessor.

        instructions: per lane and ``bytes_moved`` (read and written).
        """
        return self.multiprocessors * 4 * 32 * self.clock * bytes_moved / instructions


CARDS = (
    Card("T4", "sm_75", 40, 1.59, 320),
    Card("A100 80GB SXM", "sm_80", 108, 1.41, 2039),
    Card("RTX 3090", "sm_86", 82, 1.70, 936),
    Card("H100 SXM", "sm_90", 132, 1.98, 3350),
    Card("B200", "sm_100", 148, 1.96, 8000),
    Card("RTX 5090", "sm_120", 170, 2.41, 1792),
)
