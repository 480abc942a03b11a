"""Bytes that the kernels move against bytes that must move, and times from them: a model.

Nothing here was measured on a GPU. ``must``: every tensor once per access that the operation is
defined by, every ledger once. ``moves``: what the kernel's geometry makes of it, that is the same
plus the atomics (8 bytes each) and mask words that several threads or passes read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cards import CARDS

BLOCKS, VECTORS = 1024, 16  # of csrc/cuda/rectify.cu
CHANNEL_BLOCKS, MIN_ROWS, ROWS = 512, 4, 128
TABLE_BLOCKS = 1024  # of csrc/cuda/table.h
THREADS, SEGMENT_WORDS, BUCKETS = 256, 32, 2048


@dataclass(frozen=True)
class Case:
    name: str
    must: float
    moves: float

    @property
    def ratio(self) -> float:
        return self.moves / self.must


def _pow2(count: int, most: int) -> int:
    return 1 << (max(1, min(count, most)) - 1).bit_length()


def planes(outer: int, channels: int, inner: int, size: int) -> Case:
    """rectify on [outer, channels, inner]; as run_planes in csrc/cuda/rectify.cu chooses blocks."""
    vector = 16 // size
    vectors = math.ceil(inner / vector)
    lanes = _pow2(vectors, THREADS)
    units = outer * math.ceil(inner / (THREADS * VECTORS * vector))
    most = math.ceil(units / (THREADS // lanes))
    per_unit = math.ceil(min(vectors, THREADS * VECTORS) / lanes)
    visits = min(max(most * channels // BLOCKS, 1), max(1, VECTORS // per_unit))
    blocks = math.ceil(most / visits) * channels
    must = 2 * outer * channels * inner * size + 16 * 3 * channels
    return Case(
        f"rectify [{outer}, {channels}, {inner}] x {size} B, planes", must, must + 8 * 3 * blocks
    )


def channels_fastest(outer: int, channels: int, size: int) -> Case:
    """rectify on [outer, channels]; as run_channels chooses blocks."""
    columns = channels * size // 16
    lanes = _pow2(columns, 32)
    tiles = math.ceil(columns / lanes)
    at_once = THREADS // lanes
    visits = min(max(math.ceil(outer / at_once) * tiles // CHANNEL_BLOCKS, MIN_ROWS), ROWS)
    slices = math.ceil(outer / (at_once * visits))
    must = 2 * outer * channels * size + 16 * 3 * channels
    moves = must + 8 * 3 * channels * slices
    return Case(f"rectify [{outer}, {channels}] x {size} B, token-major", must, moves)


def step(name: str, weights: int, size: int, accesses: int) -> Case:
    """A masked step without dead words: every access of a weight, and its mask bit once."""
    must = weights * (size * accesses + 1 / 8)
    return Case(f"{name}, {weights} weights x {size} B", must, must)


def reordered_step(name: str, weights: int, size: int, accesses: int) -> Case:
    """The same in channels_last: the mask is gathered into a second one first."""
    case = step(name, weights, size, accesses)
    return Case(f"{case.name}, channels_last", case.must, case.moves + weights * 2 / 8)


def selection(weights: int, size: int, passes: int) -> Case:
    """magnitude_shares: `passes` histograms and a count, each a pass over weights and mask."""
    must = (passes + 1) * weights * (size + 1 / 8)
    words = math.ceil(weights / 32)
    chunk = max(64, math.ceil(words / TABLE_BLOCKS / 32) * 32)
    blocks = math.ceil(words / chunk)
    # Buckets that a block finds: of exponents and 3 more bits few, then all, then next to none.
    # Every segment of the count adds two sums.
    found = BUCKETS * (0.1 + 1.0 + 0.05)
    atomics = 8 * (blocks * found + 2 * words / SEGMENT_WORDS)
    return Case(f"magnitude_shares, {weights} weights x {size} B", must, must + atomics)


CASES = (
    planes(128, 64, 56 * 56, 4),
    planes(128, 256, 28 * 28, 2),
    planes(256, 512, 14 * 14, 2),
    planes(256, 2048, 7 * 7, 4),
    channels_fastest(128 * 197, 3072, 2),
    channels_fastest(128 * 197, 3072, 4),
    channels_fastest(128 * 56 * 56, 64, 4),
    channels_fastest(256 * 28 * 28, 256, 2),
    step("masked_sgd_ with momentum", 25_000_000, 4, 5),
    step("masked_adamw_", 86_000_000, 4, 7),
    reordered_step("masked_sgd_ with momentum", 25_000_000, 4, 5),
    selection(86_000_000, 4, 3),
)


def table() -> str:
    """The cases with the time that their bytes take at each card's bandwidth."""
    header = ["case", "moves / must", *(card.name for card in CARDS)]
    rows = [
        [
            case.name,
            f"{case.ratio:.3f}",
            *(f"{case.moves / card.bandwidth / 1e3:.0f} us" for card in CARDS),
        ]
        for case in CASES
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(
        ["Model, not measured: time if a card moved these bytes at its full bandwidth.", *lines]
    )
