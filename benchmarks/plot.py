"""Overhead against tensor size, from benchmarks/results.json: ``python -m benchmarks.plot``."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.table import RESULTS
from layer_collapse.files import read_json, write_atomically
from layer_collapse.report.canvas import INK, label_ends, new_axes, render

_BYTES = {"float32": 4, "bfloat16": 2}
_SHORT = {"float32": "f32", "bfloat16": "bf16"}
_COLOURS = {
    "f32": "#3987e5",
    "f32 in place": "#0ca30c",
    "bf16": "#c98500",
    "bf16 in place": "#d03b3b",
}


def lines(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """(bytes, ratio) by size, for each dtype in and out of place and each number of threads."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row["claim"] in ("overhead", "overhead_inplace"):
            name = _SHORT[row["dtype"]] + " in place" * (row["claim"] == "overhead_inplace")
            size = math.prod(row["shape"]) * _BYTES[row["dtype"]]
            found[name, row["threads"]].append((size, row["value"]))
    return {key: sorted(points) for key, points in found.items()}


def draw(report: dict[str, Any]) -> Figure:
    """One line per kind of call: solid at one thread, dashed at two."""
    figure, axes = new_axes(7.2, 3.6)
    ends = []
    for (name, threads), points in lines(report["rows"]).items():
        sizes, ratios = zip(*points, strict=True)
        style = "-" if threads == 1 else "--"
        axes.plot(sizes, ratios, style, color=_COLOURS[name], lw=1.6, marker="o", markersize=3)
        if threads == 1:
            ends.append((sizes[-1], ratios[-1], name, _COLOURS[name]))
    axes.axhline(1.0, color=INK, lw=1)
    axes.set_xscale("log", base=2)
    ticks = [4096 * 16**i for i in range(4)]
    axes.set_xticks(ticks, ["4 KB", "64 KB", "1 MB", "16 MB"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes of the tensor (solid: 1 thread, dashed: 2)")
    axes.set_title(
        "time of ReLU + counts over time of torch's ReLU", loc="left", fontsize=10, color=INK
    )
    label_ends(axes, ends, 0.07)
    return figure


if __name__ == "__main__":
    _, svg = render(draw, read_json(RESULTS))
    write_atomically(Path(__file__).with_name("overhead.svg"), svg)
