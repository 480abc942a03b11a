"""The figures of the experiments; series differ in shape as well as colour."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...paper.suites import SHORT
from ..canvas import INK, new_axes, say_nothing, style_axes
from .layers import correlation, entropy, gates, sparsity
from .summary import gone, is_variant

__all__ = ["CHARTS", "captioned", "frontiers"]

#: Colour and marker of each arm; the colours stay apart in grey and for colour-blind readers.
STYLES = {
    "continuous": ("#c8384f", "o"),
    "entropy": ("#2f7fd8", "s"),
    "magnitude": ("#d9822b", "^"),
    "drop": ("#2c8f5e", "D"),
    "shallow": ("#8a63d2", "P"),
    "dense": ("#7b8794", "*"),
    "continuous-0.7": ("#c8384f", "v"),
    "continuous-0.33": ("#c8384f", "h"),
    "uniform": ("#8a7a5c", "<"),
    "easier": ("#b0568f", ">"),
    "tlc": ("#3f9c9c", "X"),
}
_POINTS = ("dense", *SHORT, "uniform", "easier", "tlc")  # at one count alone: no line
_VARIANT = "#8a7a5c"
_DODGE = 0.008  # of the axis: arms stand beside each other, so that none hides another
_LOWEST = 20.0  # points under dense: what is lower is written at the foot


def _frontier(axes: Axes, network: dict[str, Any], macs: bool = False) -> None:
    """Test accuracy against rectifiers gone, one line per arm; what is cut stands at the foot.

    Args:
        macs: against the share of the multiply-adds that is left instead, and nothing at the foot.
    """
    rows = [row for row in network["rows"] if row["arm"] in STYLES]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    farthest = max((gone(row) for row in rows if "off" in row), default=1.0)
    for number, arm in enumerate(arms):
        fixed = macs or arm == "dense"
        aside = 0.0 if fixed else _DODGE * farthest * (number - (len(arms) - 1) / 2)
        colour, marker = STYLES[arm]
        own = sorted((r for r in rows if r["arm"] == arm and "off" in r), key=gone)
        cut = [row["asked"] for row in rows if row["arm"] == arm and row["cut"] and not macs]
        whole = network["whole"]["macs"]
        if own:
            axes.errorbar(
                [100 * row["macs"] / whole if macs else gone(row) + aside for row in own],
                [row["test_accuracy"]["mean"] for row in own],
                yerr=[_deviation(row["test_accuracy"]) for row in own],
                xerr=None if macs or arm == "shallow" else [_deviation(row["off"]) for row in own],
                color=colour,
                marker=marker,
                markerfacecolor="none" if arm in SHORT else colour,
                markersize=9 if arm == "dense" else 6,
                lw=0 if arm in _POINTS else 1.6,
                elinewidth=1.2,
                capsize=2.5,
                label=arm,
            )
        elif not cut:
            axes.plot([], [], color=colour, marker=marker, lw=0, label=f"{arm}: n/a")
        if arm == "dense" and own:
            axes.axhline(own[0]["test_accuracy"]["mean"], color=colour, lw=1, ls=(0, (5, 2)))
        if cut:
            label = None if own else f"{arm}: cut"
            foot = [0.02] * len(cut)
            transform = axes.get_xaxis_transform()
            axes.plot(cut, foot, "x", color=colour, transform=transform, label=label, clip_on=False)
            for x in cut:
                axes.annotate(
                    "cut", (x, 0.05), xycoords=transform, ha="center", fontsize=8, color=colour
                )
    if macs:
        axes.invert_xaxis()
        axes.set_xlabel("multiply-adds of the folded network (% of the unpruned network's)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("rectifiers gone from the folded network")
    axes.set_ylabel("test accuracy (%)")
    _raise_the_floor(axes, rows)


def _raise_the_floor(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Where some are far under the dense network, the axis ends above them and says so: else the
    others cannot be told apart.
    """
    dense = [row["test_accuracy"]["mean"] for row in rows if row["arm"] == "dense" and "off" in row]
    floor = dense[0] - _LOWEST if dense else -1.0
    low = sorted(row["test_accuracy"]["mean"] for row in rows if "off" in row)
    below = [accuracy for accuracy in low if accuracy < floor]
    if below:
        axes.set_ylim(bottom=floor)
        axes.text(
            0.99, 0.02, f"{len(below)} below, down to {below[0]:.0f} %", ha="right", va="bottom",
            fontsize=8, color=INK, transform=axes.transAxes,
        )  # fmt: skip


def _deviation(value: dict[str, Any]) -> float:
    """No bar where there is but one seed."""
    return float("nan") if value["deviation"] is None else float(value["deviation"])


def frontier(name: str, network: dict[str, Any], macs: bool = False) -> Figure:
    """Test accuracy against rectifiers removed, mean and deviation over the seeds."""
    figure, axes = new_axes(7.2, 4.4)
    if not network["rows"]:
        return say_nothing(figure, axes, "no cell is there yet")
    _frontier(axes, network, macs)
    axes.legend(
        frameon=False, labelcolor=INK, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return figure


def frontiers(networks: dict[str, Any]) -> Figure:
    """The frontiers of all networks, side by side."""
    columns = min(2, max(1, len(networks)))
    lines = -(-len(networks) // columns)
    figure, first = new_axes(5.2 * columns, 3.8 * lines + 0.6)
    figure.set_layout_engine("constrained", h_pad=0.12)
    if not networks:
        return say_nothing(figure, first, "no cell is there yet")
    figure.delaxes(first)
    handles: dict[str, Any] = {}
    for i, (name, network) in enumerate(networks.items(), start=1):
        axes = figure.add_subplot(lines, columns, i)
        style_axes(axes)
        _frontier(axes, network)
        axes.text(
            0.5, 1.0, wrapped(network["about"], 60), transform=axes.transAxes, ha="center",
            va="bottom", fontsize=8, color=INK,
        )  # fmt: skip
        axes.set_title(name, color=INK, fontsize=11, pad=30)
        found, labels = axes.get_legend_handles_labels()
        handles |= {
            label: handle
            for handle, label in zip(found, labels, strict=True)
            if ":" not in label and label not in handles
        }
    ncols = -(-len(handles) // 2) or 1
    # A legend is filled column by column; this order reads line by line.
    order = [one for i in range(ncols) for one in list(handles)[i::ncols]]
    figure.legend(
        [handles[label] for label in order],
        order,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        ncols=ncols,
        loc="outside lower center",
    )
    return figure


def ablations(name: str, network: dict[str, Any]) -> Figure:
    """Test accuracy of the variants at the number of rectifiers that they were asked for."""
    variants = [row for row in network["rows"] if is_variant(row["arm"]) and "off" in row]
    asked = {row["asked"] for row in variants}
    rows = [
        row
        for row in network["rows"]
        if row["arm"] in ("continuous", "drop", "entropy")
        and row["asked"] in asked
        and "off" in row
    ] + variants
    rows.sort(key=lambda row: row["asked"])
    figure, axes = new_axes(7.2, max(2.2, 1.0 + 0.3 * len(rows)))
    if not variants:
        return say_nothing(figure, axes, "no variant was run")
    for y, row in enumerate(rows):
        colour, marker = STYLES.get(row["arm"], (_VARIANT, "o"))
        accuracy = row["test_accuracy"]
        axes.plot(accuracy["values"], [y] * len(accuracy["values"]), "|", color=colour, ms=9)
        axes.errorbar(
            accuracy["mean"],
            y,
            xerr=_deviation(accuracy),
            color=colour,
            marker=marker,
            capsize=2.5,
        )
    dense = next((r for r in network["rows"] if r["arm"] == "dense" and "off" in r), None)
    if dense is not None:
        axes.axvline(dense["test_accuracy"]["mean"], color=STYLES["dense"][0], ls=(0, (5, 2)))
    names = [
        f"{row['arm']} ({gone(row):.3g} off, {row['seeds']} seed{'s' * (row['seeds'] > 1)})"
        for row in rows
    ]
    axes.set_yticks(np.arange(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("test accuracy (%): each seed, mean, deviation; dashed: dense")
    return figure


def latency(name: str, network: dict[str, Any]) -> Figure:
    """Time of the folded networks against the whole one, at batch 1 and 64."""
    rows = sorted((row for row in network["rows"] if "off" in row), key=lambda row: row["asked"])
    figure, axes = new_axes(7.2, max(2.2, 0.9 + 0.42 * len(rows)))
    if not rows:
        return say_nothing(figure, axes, "no latency was measured")
    sizes = list(rows[0]["latency"])
    for i, size in enumerate(sizes):
        offset = (i - (len(sizes) - 1) / 2) * 0.36
        for y, row in enumerate(rows):
            found = row["latency"][size]
            axes.barh(
                y + offset,
                found["ratio"]["mean"],
                0.34,
                xerr=found["ratio"]["deviation"],
                color=("#2f7fd8", "#9cc3ec")[i % 2],
                ecolor=INK,
                error_kw={"lw": 1},
                label=None if y else f"batch {size} (unfolded {network['before_ms'][size]:.3g} ms)",
            )
    axes.axvline(1.0, color=INK, lw=1, ls=(0, (5, 2)))
    names = [f"{row['arm']} ({row['asked']} asked, {gone(row):.3g} off)" for row in rows]
    axes.set_yticks(np.arange(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set_xlabel("processor time of the folded network (the whole network, unfolded = 1)")
    figure.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=2, loc="outside lower right")
    return figure


def captioned(
    draw: Callable[[str, dict[str, Any]], Figure], title: str, name: str, network: dict[str, Any]
) -> Figure:
    """A figure under its title and the sizes that it was measured at."""
    figure = draw(name, network)
    about = wrapped(network["about"], int(14 * figure.get_figwidth()))
    figure.suptitle(f"{name}: {title}\n{about}", color=INK, fontsize=8.5, x=0.01, ha="left")
    return figure


def wrapped(text: str, width: int) -> str:
    """Broken into lines between words."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return "\n".join(lines)


CHARTS: dict[str, Callable[[str, dict[str, Any]], Figure]] = {
    "frontier": frontier,
    "macs": partial(frontier, macs=True),
    "ablations": ablations,
    "entropy": entropy,
    "correlation": correlation,
    "sparsity": sparsity,
    "latency": latency,
    "gates": gates,
}
"""What draws each figure of a network, by the name of its file."""
