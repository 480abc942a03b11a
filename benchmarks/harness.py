"""How a case is timed: ours and its peers in turns, so that all of them see the same machine.

A round runs every side once, each side for the same number of calls (about a millisecond of the
fastest side). The ratio is the median over the rounds of ours / peer *of that round*: drift of the
clock or of the machine meets both. The spread is the interquartile range of those ratios; where the
rounds are few, or the spread is wide, run again before believing a difference of a few percent.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims import CLAIMS, within

Side = Callable[[], Any]
_ROUND = 1e-3  # seconds that a round of the fastest side takes at least


@dataclass(frozen=True)
class Effort:
    """How long a case is measured: for ``seconds`` in all, within ``least`` and ``most`` rounds."""

    seconds: float
    least: int
    most: int = 201


FULL, QUICK = Effort(0.6, 9), Effort(0.15, 3)


def race(
    pedantic: Callable[..., Any],
    sides: Sequence[Side],
    effort: Effort,
    before: Callable[[], Any] | None = None,
) -> tuple[list[list[float]], int]:
    """Time all sides in turns; each has been called before, when their results were compared.

    Args:
        pedantic: ``benchmark.pedantic`` of pytest-benchmark, which keeps its own times of
            ``sides[0]``. The times returned are taken by one piece of code for every side.
        before: prepares a call, untimed; a round is then a single call.

    Returns:
        Seconds per call: one list per side, one entry per round; and the calls per round.
    """
    prepare = before or (lambda: None)

    def seconds_of(side: Side, calls: int) -> float:
        prepare()
        start = time.perf_counter()
        for _ in range(calls):
            side()
        return (time.perf_counter() - start) / calls

    first = [seconds_of(side, 1) for side in sides]
    times: list[list[float]] = [[seconds] for seconds in first]
    if sum(first) < effort.seconds:  # too short to be trusted: the first calls pay for caches
        first = [min(seconds_of(side, 1) for _ in range(3)) for side in sides]
        times = [[] for _ in sides]
    calls = 1 if before else max(1, math.ceil(_ROUND / min(first)))
    rounds = min(effort.most, max(effort.least, int(effort.seconds / (calls * sum(first)))))

    def turn(index: int) -> None:
        times[index].append(seconds_of(sides[index], calls))

    def peers_turn() -> None:
        for index in range(1, len(sides)):
            turn(index)

    gc.collect()
    gc.disable()
    try:
        pedantic(lambda: turn(0), setup=peers_turn, rounds=rounds - len(times[0]))
    finally:
        gc.enable()
    return times, calls


def machine() -> dict[str, str]:
    """What every row says about where and when it was measured."""
    model = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = f"{names[0].split(':')[1].strip()}, {model}" if names else model
    return {
        "device": f"{model}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def make_row(
    claim: str, case: str, ours: Sequence[float], peer: Sequence[float], **more: Any
) -> dict[str, Any]:
    """One row of results.json from the seconds of both sides, round by round.

    ``value`` is what the bar is for: the ratio, or the difference in microseconds. ``holds``
    compares this one case with the bar of the mean; ``claims.verdicts`` judges the whole claim.
    """
    facts = CLAIMS[claim]
    ratios = [mine / other for mine, other in zip(ours, peer, strict=True)]
    values = ratios
    if facts.unit == "us":
        values = [(mine - other) * 1e6 for mine, other in zip(ours, peer, strict=True)]
    low, value, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "claim": claim,
        "case": case,
        "ours_ms": statistics.median(ours) * 1e3,
        "peer": facts.peer,
        "peer_ms": statistics.median(peer) * 1e3,
        "ratio": statistics.median(ratios),
        "unit": facts.unit,
        "value": value,
        "spread": [low, high],
        "bar": facts.bar,
        "worst": facts.worst,
        "holds": None if facts.bar is None else within(value, facts.bar),
        "rounds": len(ratios),
        "passes": [value],
        **more,
    }


def combine(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case from those of all passes: their median ``value``, of two the mean.

    Times and ratio are those of the middle pass (the lower of two); ``passes`` keeps the value of
    every pass, in order. Where there is more than one, ``spread`` becomes their range: it tells
    what may be believed, and is wider than that within a pass.
    """
    passes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        passes.setdefault((row["claim"], row["case"], row["threads"]), []).append(row)
    combined = []
    for same in passes.values():
        values = [row["value"] for row in same]
        middle = sorted(same, key=lambda row: row["value"])[(len(same) - 1) // 2]
        if len(same) > 1:
            value, bar = statistics.median(values), middle["bar"]
            middle = middle | {"spread": [min(values), max(values)], "passes": values}
            middle |= {"value": value, "holds": None if bar is None else within(value, bar)}
        combined.append(middle)
    return combined


def renewed(
    known: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """``rows``, and of ``known`` the claims that they do not touch, in the order of ``CLAIMS``.

    Raises:
        ValueError: what is known and would stay is of another machine or another torch.
    """
    measured = {row["claim"] for row in rows}
    kept = [row for row in known if row["claim"] in CLAIMS and row["claim"] not in measured]
    for row in kept:
        if (row["device"], row["torch"]) != (rows[0]["device"], rows[0]["torch"]):
            raise ValueError(
                f"{row['claim']} was measured on {row['device']}, torch {row['torch']}, and this "
                f"is {rows[0]['device']}, torch {rows[0]['torch']}; these rows cannot "
                "stand in one file"
            )
    order = list(CLAIMS)
    return sorted([*kept, *rows], key=lambda row: order.index(row["claim"]))


class Bench:
    """What a case is given: ``bench(case, ours, {claim: peer})`` measures and keeps the rows."""

    def __init__(
        self, pedantic: Callable[..., Any], effort: Effort, threads: int, rows: list[dict[str, Any]]
    ) -> None:
        self._pedantic, self._effort, self._threads = pedantic, effort, threads
        self._rows = rows

    @property
    def quick(self) -> bool:
        return self._effort is QUICK

    def __call__(
        self,
        case: str,
        ours: Side,
        peers: Mapping[str, Side],
        like: Tensor,
        *,
        before: Callable[[], Any] | None = None,
        calls: int = 1,
    ) -> None:
        """Measure; every entry of ``peers`` gives a row.

        Args:
            like: tensor whose dtype and shape the row states.
            before: see :func:`race`.
            calls: how many calls one call of a side stands for, if it loops by itself.
        """
        times, repeats = race(self._pedantic, [ours, *peers.values()], self._effort, before)
        mine, *others = [[seconds / calls for seconds in side] for side in times]
        for claim, other in zip(peers, others, strict=True):
            facts = {"calls": repeats * calls, "threads": self._threads}
            facts |= {"dtype": str(like.dtype).removeprefix("torch."), "shape": list(like.shape)}
            self._rows.append(make_row(claim, case, mine, other, **facts, **machine()))
