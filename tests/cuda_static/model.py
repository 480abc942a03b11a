"""Bytes that the kernels move against bytes that must move, and times from them: a model.

Nothing here was measured on a GPU. ``must``: every tensor once per access that the operation is
defined by, every ledger once. ``moves``: what the kernel's geometry makes of it, that is the same
plus the atomics (8 bytes each) and mask words that several threads or passes read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cards import CARDS

BLOCKS, VECTORS = 1024, 16  # of csrc/cuda/rectify.cu
CHANNEL_BLOCKS, MIN_ROWS, ROWS = 512, 4, 128
HISTOGRAM_BLOCKS = 384  # of csrc/cuda/magnitude_select.cu
MIN_CHUNK = 64  # of csrc/cuda/table.h
THREADS, SEGMENT_WORDS, BUCKETS = 256, 32, 2048
WARPS = THREADS // 32
SUMMARY = 8  # columns of a summary


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


def apply_masks(weights: int, size: int, pruned: float) -> Case:
    """Zeros where weights are pruned; reads masks alone.

    Vectors that are pruned as a whole are one store, other weights are stored singly: the bytes are
    the same, though a card may move a sector of 32 for a single weight.
    """
    must = weights * (1 / 8 + pruned * size)
    return Case(f"apply_masks_, {weights} weights x {size} B, {pruned:.0%} pruned", must, must)


def entropies(name: str, channels: Sequence[int]) -> Case:
    """layer_entropies of ReLUs: positions and three rows of counts; a row of numbers per layer.

    Every warp reads the positions for itself.
    """
    neurons, layers = sum(channels), len(channels)
    must = 8 * (layers + 3 * neurons) + 8 * SUMMARY * layers + (8 + 1) * neurons
    return Case(f"layer_entropies, {name}", must, must + 8 * (WARPS - 1) * layers)


def live(outer: int, channels: int, inner: int, size: int) -> Case:
    """rectify with live=True: the last block reads the ledger, every block takes a ticket."""
    plain = planes(outer, channels, inner, size)
    blocks = (plain.moves - plain.must) / (8 * 3)
    own = 8 * (3 * channels + WARPS + 3)
    return Case(f"{plain.name}, live", plain.must + own, plain.moves + own + 8 * blocks)


def _histogram_atomics(weights: int) -> float:
    """Bytes of the sums that the blocks of one pass add to a histogram, if all buckets occur."""
    words = math.ceil(weights / 32)
    chunk = max(MIN_CHUNK, math.ceil(words / HISTOGRAM_BLOCKS / 32) * 32)
    return 8 * math.ceil(words / chunk) * BUCKETS


#: Of the buckets, those that a block finds with each digit, by the bytes of a weight: of exponents
#: few; then of halves those that their last 7 bits make, of others all; then next to none, as few
#: weights are left.
FOUND = {2: 0.1 + 128 / BUCKETS, 4: 0.1 + 1.0 + 0.05, 8: 0.05 + 1.0 + 0.05}


def histogram(weights: int, size: int) -> Case:
    """magnitude_histogram, second digit of float: one pass, 16 KB that are cleared and filled."""
    must = weights * (size + 1 / 8) + 2 * 8 * (BUCKETS + 1)
    moves = must + _histogram_atomics(weights)
    return Case(f"magnitude_histogram, {weights} weights x {size} B", must, moves)


def selection(weights: int, size: int, passes: int) -> Case:
    """magnitude_shares: `passes` histograms and a count, each a pass over weights and mask."""
    must = (passes + 1) * weights * (size + 1 / 8)
    # Every segment of the count adds two sums.
    segments = weights / 32 / SEGMENT_WORDS
    atomics = FOUND[size] * _histogram_atomics(weights) + 8 * 2 * segments
    return Case(f"magnitude_shares, {weights} weights x {size} B", must, must + atomics)


def prune(weights: int, size: int, passes: int) -> Case:
    """magnitude_prune_: `passes` histograms, a count, and a last pass that writes the mask."""
    must = (passes + 2) * weights * (size + 1 / 8) + weights / 8
    # The ties of a segment are written, read and written by the scan, and read.
    segments = weights / 32 / SEGMENT_WORDS
    more = FOUND[size] * _histogram_atomics(weights) + 8 * 4 * segments
    return Case(f"magnitude_prune_, {weights} weights x {size} B", must, must + more)


#: Channels of the ReLUs of a ResNet-50.
RESNET50 = (
    64,
    *(64, 64, 256) * 3,
    *(128, 128, 512) * 4,
    *(256, 256, 1024) * 6,
    *(512, 512, 2048) * 3,
)


CASES = (
    planes(128, 64, 56 * 56, 4),
    planes(128, 256, 28 * 28, 2),
    planes(256, 512, 14 * 14, 2),
    planes(256, 2048, 7 * 7, 4),
    channels_fastest(128 * 197, 3072, 2),
    channels_fastest(128 * 197, 3072, 4),
    channels_fastest(128 * 56 * 56, 64, 4),
    channels_fastest(256 * 28 * 28, 256, 2),
    live(128, 256, 28 * 28, 2),
    entropies("ResNet-50", RESNET50),
    step("masked_sgd_", 25_000_000, 4, 3),
    step("masked_sgd_ with momentum", 25_000_000, 4, 5),
    step("masked_adamw_", 86_000_000, 4, 7),
    step("masked_adamw_ with amsgrad", 86_000_000, 2, 9),
    reordered_step("masked_sgd_ with momentum", 25_000_000, 4, 5),
    apply_masks(86_000_000, 4, 0.5),
    apply_masks(86_000_000, 2, 0.99),
    histogram(86_000_000, 4),
    selection(86_000_000, 4, 3),
    selection(86_000_000, 8, 6),
    prune(86_000_000, 4, 3),
    prune(86_000_000, 2, 3),
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
