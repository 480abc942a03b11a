"""The words and number formats that the page, the terminal and the charts share."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["CUT", "checked", "difference", "format_value", "headline", "layer_names", "ratio"]

CUT = (
    "This network is cut: its output is the same for every input, "
    "so the layers it lost mean nothing."
)

_PAIR = ("before", "after")
_SCHEMA: dict[str, tuple[str, ...]] = {  # key -> keys below it
    "data": (),
    "model": (),
    "strategy": (),
    "seed": (),
    "layers": (),
    "rectifiers": _PAIR,
    "depth": _PAIR,
    "parameters": _PAIR,
    "macs": _PAIR,
    "agreement_with_original": (),
    "accuracy": ("start", "final", "dense_control", "shallow_control"),
    "latency_ms": (*_PAIR, "batch", "threads"),
    "proof": ("max_abs", "max_rel"),
    "epochs": ("collapse", "dense_control"),
    "seconds": (),
    "versions": (),
    "cut": (),
    "history": (),
    "settings": (),
}
_LAYER = ("name", "kind", "entropy_first", "entropy_last", "state", "action")
_ROUND = ("round", "phase", "sparsity", "validation_accuracy", "entropy", "alive")


def checked(report: dict[str, Any]) -> dict[str, Any]:
    """Return ``report`` if it has every key of the schema.

    Raises:
        ValueError: names the first key that is missing.
    """
    for key, below in _SCHEMA.items():
        _need(report, "", (key,))
        _need(report[key], f"{key}.", below)
    for key, below in (("layers", _LAYER), ("history", _ROUND)):
        for i, row in enumerate(report[key]):
            _need(row, f"{key}.{i}.", below)
    return report


def _need(node: Any, prefix: str, keys: tuple[str, ...]) -> None:
    for key in keys:
        if not isinstance(node, dict) or key not in node:
            raise ValueError(
                f"report: expected the key {prefix + key!r}, but it is missing; "
                "use null for what was not run"
            )


def format_value(value: Any, style: str = "plain", missing: str = "not run") -> str:
    """Format one value of the report for people.

    Args:
        value: number, string, bool, list, dict or None.
        style: ``count``, ``percent`` (value in percent), ``fraction`` (value from 0 to 1, shown in
            percent), ``points`` (difference of percents), ``ratio``, ``ms``, ``bits``, ``error``,
            ``seconds`` or ``plain``.
        missing: text for None.
    """
    if value is None:
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value) if value not in ([], {}) else "none"
    if style == "fraction":
        # Cut off, not rounded: 99.9996 % must never be shown as 100 %.
        return f"{math.floor(round(value * 1e5, 6)) / 1e3:g} %"
    formats = {
        "count": "{:,}",
        "percent": "{:.1f} %",
        "points": "{:+.1f}",
        "ratio": "{:.2f} x",
        "ms": "{:.3g} ms" if value < 100 else "{:,.0f} ms",
        "bits": "{:.3f}" if value >= 0.001 else "{:.1e}" if value else "0",  # 0 is exact
        "error": "{:.1e}" if value else "0",
        "seconds": "{:,.1f} s",
        "plain": "{}",
    }
    return formats[style].format(value)


def difference(a: float | None, b: float | None) -> float | None:
    """Return a - b, None if either was not run."""
    return None if a is None or b is None else a - b


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b, None if either was not run or b is 0."""
    return None if a is None or not b else a / b


def layer_names(report: dict[str, Any]) -> list[str]:
    """Names of all layers that any round measured, in the order of the network."""
    names = dict.fromkeys(layer["name"] for layer in report["layers"])
    for row in report["history"]:
        names |= dict.fromkeys([*row["entropy"], *row["alive"]])
    return list(names)


def headline(report: dict[str, Any]) -> str:
    """Return the result of a run in one sentence."""
    if report["cut"]:
        return CUT
    rectifiers, accuracy, latency = (report[k] for k in ("rectifiers", "accuracy", "latency_ms"))
    left = difference(rectifiers["before"], rectifiers["after"])
    final, dense = (format_value(accuracy[k], "percent") for k in ("final", "dense_control"))
    times = format_value(ratio(latency["after"], latency["before"]), "ratio", "not measured")
    return (
        f"{format_value(left)} of {format_value(rectifiers['before'])} rectifiers left the "
        f"network; accuracy {final} (dense control {dense}); latency {times}"
    )
