"""Figures that show every layer: entropy over the epochs, sparsity, what the neurons do."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..canvas import INK, new_axes, printable, say_nothing, style_axes

__all__ = ["correlation", "entropy", "gates", "sparsity"]

_SHOWN = ("dense", "continuous", "drop", "entropy", "magnitude")
_ON_COLOUR = "#f6f8fa"  # on light pages and dark ones: what lies below is dark
_STATES = {
    "mixed": ("switches", "#2f7fd8", ""),
    "on": ("always on", "#9cc3ec", "//"),
    "off": ("always off", "#d9822b", ".."),
    "saturated": ("always saturated", "#8a63d2", "xx"),
}


def _arms(network: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each arm that is shown, the layers at its first number of rectifiers, seed 0."""
    found: dict[str, dict[str, Any]] = {}
    for key, layers in network["layers"].items():
        arm, _, asked = key.rpartition(" ")
        if arm in _SHOWN and arm not in found:
            found[arm] = layers | {"title": arm if asked == "0" else f"{arm}, {asked} asked"}
    return {arm: found[arm] for arm in _SHOWN if arm in found}


def _panels(arms: dict[str, Any], layers: int, width: float = 2.6) -> tuple[Figure, list[Axes]]:
    """One panel per arm, side by side, with a common axis of layers."""
    figure, first = new_axes(1.8 + width * len(arms), max(2.6, 1.1 + 0.17 * layers))
    figure.delaxes(first)
    panels: list[Axes] = []
    for i, arm in enumerate(arms, start=1):
        axes = figure.add_subplot(1, len(arms), i, sharey=panels[0] if panels else None)
        style_axes(axes)
        axes.set_title(arms[arm]["title"], color=INK, fontsize=9)
        panels.append(axes)
    return figure, panels


def _name_layers(panels: list[Axes], names: list[str]) -> None:
    panels[0].set_yticks(range(len(names)), [printable(name) for name in names], fontsize=7)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    panels[0].set_ylim(len(names) - 0.5, -0.5)


def _write(axes: Axes, y: int, text: str) -> None:
    """A word in the row of a layer that has no bar."""
    axes.text(2, y, text, va="center", fontsize=6, color=INK)


def _nothing(why: str) -> Figure:
    return say_nothing(*new_axes(6.0, 2.4), why)


def entropy(name: str, network: dict[str, Any]) -> Figure:
    """Heat map of each layer's entropy over the epochs, one panel per arm."""
    arms = {arm: found for arm, found in _arms(network).items() if found["history"]}
    if not arms:
        return _nothing("no entropy was measured")
    names = _names(arms)
    figure, panels = _panels(arms, len(names))
    colours = mpl.colormaps["viridis"].with_extremes(bad=(1.0, 1.0, 1.0, 0.0))
    image = None
    for axes, found in zip(panels, arms.values(), strict=True):
        history = _last_of_each_epoch(found["history"])
        values = np.array(
            [[_value(m["rectifiers"].get(layer), "H") for m in history] for layer in names]
        )
        # Each measurement fills the time since the one before.
        edges = np.array([0.0, *(m["epoch"] for m in history)])
        image = axes.pcolormesh(
            edges, np.arange(len(names) + 1) - 0.5, values, cmap=colours, vmin=0.0, vmax=1.0
        )
        zero = np.argwhere(values == 0.0)
        middles = (edges[1:] + edges[:-1]) / 2
        axes.plot(middles[zero[:, 1]], zero[:, 0], "x", color=_ON_COLOUR, markersize=3, mew=0.8)
        axes.grid(False)
        axes.set_xlabel("epoch")
    _name_layers(panels, names)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.01)
    bar.set_label("neuron entropy (bits)\nx: exactly 0; blank: left before", color=INK, fontsize=8)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _last_of_each_epoch(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One measurement for each time: the final scan stands for the last one of the training. What
    was measured before the first step is drawn as the shortest of beginnings.
    """
    latest = {measured["epoch"]: measured for measured in history}
    first, *later = latest.values()
    return [first | {"epoch": first["epoch"] or 1e-3}, *later]


def sparsity(name: str, network: dict[str, Any]) -> Figure:
    """Share of the weights of each layer that are zero at the end, one panel per arm."""
    arms = {arm: found for arm, found in _arms(network).items() if arm != "dense"}
    if not arms:
        return _nothing("no sparsity was measured")
    names = _names(arms)
    figure, panels = _panels(arms, len(names), 2.2)
    for axes, found in zip(panels, arms.values(), strict=True):
        rows = {row["name"]: row for row in found["final"]}
        for y, layer in enumerate(names):
            value = _value(rows.get(layer), "sparsity")
            if layer not in rows:  # its rectifier left; the layer may still be there
                _write(axes, y, "no rectifier")
            elif not value > 0:  # no weight is zero, or no layer of weights feeds it alone
                _write(axes, y, "0" if value == 0 else "-")
            else:
                axes.barh(y, 100 * value, 0.7, color="#2f7fd8")
                if value == 1.0:
                    axes.text(98, y, "empty", ha="right", va="center", fontsize=6, color=_ON_COLOUR)
        axes.set_xlim(0, 100)
        axes.grid(False, axis="y")
        axes.set_xlabel("zero weights (%)")
    _name_layers(panels, names)
    return figure


def gates(name: str, network: dict[str, Any]) -> Figure:
    """What the neurons of each layer do at the end: switch, or always the same."""
    arms = {arm: found for arm, found in _arms(network).items() if found["final"]}
    if not arms:
        return _nothing("no neuron was measured")
    names = _names(arms)
    some = {key for found in arms.values() for row in found["final"] for key in row if row[key]}
    states = {key: look for key, look in _STATES.items() if key in some}
    figure, panels = _panels(arms, len(names), 2.2)
    for axes, found in zip(panels, arms.values(), strict=True):
        rows = {row["name"]: row for row in found["final"]}
        left = np.zeros(len(names))
        for key, (label, colour, hatch) in states.items():
            share = np.array(
                [100 * rows[n][key] / max(rows[n]["neurons"], 1) if n in rows else 0 for n in names]
            )
            axes.barh(
                range(len(names)), share, 0.75, left, color=colour, hatch=hatch,
                edgecolor="#ffffff", lw=0, label=label,
            )  # fmt: skip
            left += share
        for y, layer in enumerate(names):
            if layer not in rows:
                _write(axes, y, "no rectifier")
        axes.set_xlim(0, 100)
        axes.grid(False, axis="y")
        axes.set_xlabel("neurons (%)")
    _name_layers(panels, names)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, labelcolor=INK, fontsize=8, ncols=4,
        loc="outside lower center",
    )  # fmt: skip
    return figure


def correlation(name: str, network: dict[str, Any]) -> Figure:
    """Entropy against sparsity, a point per layer and measurement, seed 0; the rank correlation is
    that of all seeds.
    """
    arms = {arm: found for arm, found in _arms(network).items() if arm in ("entropy", "magnitude")}
    figure, axes = new_axes(6.4, 3.8)
    drawn = False
    for arm, found in arms.items():
        points = [
            (_value(row, "sparsity"), _value(row, "H"))
            for measured in found["history"]
            for row in measured["rectifiers"].values()
        ]
        points = [(s, h) for s, h in points if np.isfinite(s) and np.isfinite(h)]
        known = network["correlation"].get(arm)
        label = f"{arm}, rank correlation {known['rho']:.2f} over all seeds" if known else arm
        colour, marker = {"entropy": ("#2f7fd8", "s"), "magnitude": ("#d9822b", "^")}[arm]
        axes.scatter(
            [100 * s for s, _ in points], [h for _, h in points], s=26, marker=marker,
            color=colour, alpha=0.75, label=label,
        )  # fmt: skip
        drawn = drawn or bool(points)
    if not drawn:
        return say_nothing(figure, axes, "nothing was pruned")
    axes.set_xlabel("weights of the layer that are zero (%)")
    axes.set_ylabel("neuron entropy (bits)")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _names(arms: dict[str, dict[str, Any]]) -> list[str]:
    """Layers in the order of the network that has lost none, if any shows it."""
    longest = max((found["final"] for found in arms.values()), key=len)
    names = dict.fromkeys(row["name"] for row in longest)
    for found in arms.values():
        names |= dict.fromkeys(row["name"] for row in found["final"])
        for measured in found["history"]:
            names |= dict.fromkeys(measured["rectifiers"])
    return list(names)


def _value(row: dict[str, Any] | None, key: str) -> float:
    return float("nan") if row is None or row[key] is None else float(row[key])
