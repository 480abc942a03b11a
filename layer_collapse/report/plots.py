"""The charts of a run: entropy over the rounds, accuracy against sparsity, before and after.

Series differ in dash or shape as well as colour, so they survive a grey copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from layer_collapse.report.canvas import INK, End, label_ends, new_axes, printable, say_nothing
from layer_collapse.report.text import format_value, layer_names, ratio

__all__ = ["CHARTS", "accuracy", "before_after", "entropy"]

BEFORE, AFTER, CONTROL = "#98a2ae", "#2f7fd8", "#d9822b"
# From the first layer to the last; every shade stands out on white and on the dark page.
_DEPTH = LinearSegmentedColormap.from_list("depth", ["#2f7fd8", "#a35cc9", "#e0528a", "#e08a2e"])
_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_PHASES = {"dense": ("s", "dense training"), "prune": ("o", "pruning"), "accept": ("D", "removal")}
_MARKS = (0.0, 0.5, 0.75, 0.9, 0.97, 0.99, 0.997, 0.999, 0.9999, 0.99999, 0.999999)


def entropy(report: dict[str, Any]) -> Figure:
    """Entropy of each layer over the rounds, labelled at its last measured value."""
    history = report["history"]
    lines = {
        name: np.array([_number(row["entropy"].get(name)) for row in history])
        for name in layer_names(report)
    }
    lines = {name: line for name, line in lines.items() if np.isfinite(line).any()}
    height = max(3.6, 0.9 + 0.24 * len(lines))
    figure, axes = new_axes(8.0, height)
    if not lines:
        return say_nothing(figure, axes, "no entropy was measured")
    axes.set_ylabel("neuron entropy (bits)")
    axes.grid(False, axis="x")
    ends: list[End] = []
    for i, (name, line) in enumerate(lines.items()):
        colour = mpl.colors.to_hex(_DEPTH(i / max(len(lines) - 1, 1)))
        axes.plot(
            line,
            color=colour,
            linestyle=_DASHES[i % len(_DASHES)],
            marker="o",
            markersize=3.5,
            lw=1.8,
        )
        last = int(np.flatnonzero(np.isfinite(line))[-1])
        ends.append((last, float(line[last]), name, colour))
    top = max(float(np.nanmax(line)) for line in lines.values())
    axes.set_ylim(-0.05 * max(top, 0.1), 1.08 * max(top, 0.1))
    _name_rounds(axes, history)
    label_ends(axes, ends, gap=0.19 / (height - 0.9))
    return figure


def accuracy(report: dict[str, Any]) -> Figure:
    """Validation accuracy against sparsity, with the dense control's test accuracy as a line."""
    figure, axes = new_axes(6.0, 3.8)
    rows = [
        row
        for row in report["history"]
        if row["sparsity"] is not None and row["validation_accuracy"] is not None
    ]
    if not rows:
        return say_nothing(figure, axes, "no accuracy was measured")
    # Everything happens close to 100 %, so equal steps are tenths of the weights still alive.
    finite = [row["sparsity"] for row in rows if row["sparsity"] < 1.0]
    end = math.ceil(max((_tenths(s) for s in finite), default=0.0) * 2 + 0.2) / 2 + 0.5
    x = [_tenths(row["sparsity"]) if row["sparsity"] < 1.0 else end for row in rows]
    y = [row["validation_accuracy"] for row in rows]
    axes.plot(x, y, color=AFTER, lw=1.4, zorder=2)
    for phase, (marker, label) in _PHASES.items():
        points = [(a, b) for a, b, row in zip(x, y, rows, strict=True) if row["phase"] == phase]
        if points:
            axes.scatter(
                [a for a, _ in points],
                [b for _, b in points],
                s=30,
                color=AFTER,
                marker=marker,
                label=label,
                zorder=3,
            )
    control = report["accuracy"]["dense_control"]
    if control is not None:
        label = f"dense control, test ({format_value(control, 'percent')})"
        axes.axhline(control, color=CONTROL, linestyle=(0, (5, 2)), lw=1.6, label=label)
    low, high = min([*y, control or y[0]]), max([*y, control or y[0]])
    margin = max(0.08 * (high - low), 0.5)
    axes.set_ylim(low - margin, high + margin)
    marks = [mark for mark in _MARKS if _tenths(mark) <= min(max(x), end - 0.25) + 1e-9]
    ticks = {_tenths(mark): f"{100 * mark:g} %" for mark in marks}
    if max(x) == end:
        ticks[end] = "100 %"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(-0.05 * max(max(x), 0.2), 1.05 * max(max(x), 0.2))
    axes.set_xlabel("pruned weights of the candidate layers")
    axes.set_ylabel("validation accuracy (%)")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="best")
    return figure


def before_after(report: dict[str, Any]) -> Figure:
    """Depth, rectifiers, parameters and latency after the run, in percent of before."""
    figure, axes = new_axes(6.0, 3.8)
    groups = (
        ("rectifiers", "rectifiers", "count"),
        ("depth", "depth", "count"),
        ("parameters", "parameters", "count"),
        ("latency_ms", "latency", "ms"),
    )
    widest = 100.0
    for i, (key, _, style) in enumerate(groups):
        before, after = report[key]["before"], report[key]["after"]
        part = ratio(after, before)
        if part is None:
            axes.text(1, i, "not measured", va="center", color=INK, fontsize=9)
            continue
        widest = max(widest, 100 * part)
        labels = (format_value(before, style), f"{format_value(after, style)} ({100 * part:.0f} %)")
        axes.barh(i - 0.19, 100, 0.34, color=BEFORE, label="" if i else "before")
        axes.barh(i + 0.19, 100 * part, 0.34, color=AFTER, label="" if i else "after")
        for offset, width, label in zip((-0.19, 0.19), (100, 100 * part), labels, strict=True):
            axes.text(width + 1.5, i + offset, label, va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(groups)), [name for _, name, _ in groups])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.32 * widest)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("before = 100 %")
    figure.legend(
        handles=[
            Patch(color=BEFORE, label="before"),
            Patch(color=AFTER, label="after"),
        ],
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        ncols=2,
        loc="outside upper right",
    )
    return figure


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _tenths(sparsity: float) -> float:
    """Sparsity below 1 as powers of ten taken off the weights: 0.9 -> 1, 0.99 -> 2."""
    return -math.log10(1.0 - sparsity)


def _name_rounds(axes: Axes, history: list[dict[str, Any]]) -> None:
    """Name the rows of the history on the x axis, as many as fit."""
    step = math.ceil(len(history) / 12)
    ticks = range(0, len(history), step)
    names = [f"{printable(history[i]['phase'])}\n{history[i]['round']}" for i in ticks]
    axes.set_xticks(list(ticks), names)
    axes.set_xlabel("round")
    axes.set_xlim(-0.3, max(len(history) - 1, 1) + 0.15)


CHARTS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "entropy": entropy,
    "accuracy": accuracy,
    "before_after": before_after,
}
"""What draws each chart, by the name of its file."""
