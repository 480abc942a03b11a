"""The report as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from layer_collapse.report.text import format_value, headline

__all__ = ["summary"]


def summary(report: dict[str, Any]) -> Table:
    """Return a rich table: the headline, one row per layer, and the numbers of the run below.

    Args:
        report: the report as given to :func:`layer_collapse.report.write`.
    """
    cut = bool(report["cut"])
    table = Table(
        title=Text(headline(report), style="bold white on red" if cut else "bold"),
        caption=Text("\n".join(_facts(report)), style="default"),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    table.add_column("bits first", justify="right")
    table.add_column("last", justify="right")
    table.add_column("state")
    table.add_column("action", overflow="fold")
    for layer in report["layers"]:
        cells = (
            layer["name"],
            layer["kind"],
            format_value(layer["entropy_first"], "bits", "-"),
            format_value(layer["entropy_last"], "bits", "-"),
            layer["state"],
            layer["action"],
        )
        # Text, because rich would read "[...]" in a name as markup.
        row_style = "dim" if layer["action"] == "kept" else "green"
        table.add_row(*(Text(str(cell)) for cell in cells), style=None if cut else row_style)
    return table


def _facts(report: dict[str, Any]) -> list[str]:
    accuracy, proof = report["accuracy"], report["proof"]

    def pair(key: str, style: str) -> str:
        before, after = (format_value(report[key][when], style) for when in ("before", "after"))
        return f"{before} → {after}"

    controls = (("start", "start"), ("dense", "dense_control"), ("shallow", "shallow_control"))
    compared = ", ".join(f"{n} {format_value(accuracy[k], 'percent')}" for n, k in controls)
    latency = report["latency_ms"]
    measured = f"batch {format_value(latency['batch'])}, {format_value(latency['threads'])} threads"
    agreement = format_value(report["agreement_with_original"], "fraction")
    return [
        f"rectifiers  {pair('rectifiers', 'count')}   depth  {pair('depth', 'count')}",
        f"parameters  {pair('parameters', 'count')}   MACs  {pair('macs', 'count')}",
        f"latency     {pair('latency_ms', 'ms')} ({measured})",
        f"accuracy    {format_value(accuracy['final'], 'percent')} ({compared})",
        f"proof       largest error {format_value(proof['max_abs'], 'error')} absolute, "
        f"{format_value(proof['max_rel'], 'error')} relative; agreement {agreement}",
    ]
