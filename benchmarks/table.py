"""The summary of benchmarks/results.json as Markdown: ``python -m benchmarks.table [FILE ...]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims import CLAIMS, verdicts
from layer_collapse.files import read_json

RESULTS = Path(__file__).with_name("results.json")


def _value(number: float | None, unit: str) -> str:
    if number is None:
        return "-"
    if unit == "us":
        return f"{number:.1f} us"
    return f"{number:.2f}" if number >= 0.1 else f"{number:.3f}"


def _range(entry: Mapping[str, Any]) -> str:
    low, high = (_value(bound, entry["unit"]) for bound in entry["spread"])
    return low if low == high else f"{low} to {high}"


def _bar(entry: Mapping[str, Any]) -> str:
    worst = "" if entry["worst"] is None else f" [{_value(entry['worst'], entry['unit'])}]"
    return _value(entry["bar"], entry["unit"]) + worst


def _holds(verdict: bool | None) -> str:
    return {True: "yes", False: "NO", None: "-"}[verdict]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every row, then the verdict on every claim."""
    cases = [["claim", "case", "threads", "ours ms", "peer", "peer ms", "value", "spread", "bar"]]
    for row in rows:
        measured = [f"{row['ours_ms']:.4f}", row["peer"], f"{row['peer_ms']:.4f}"]
        value = _value(row["value"], row["unit"])
        what = [row["claim"], row["case"], str(row["threads"])]
        cases.append([*what, *measured, value, _range(row), _bar(row)])
    claims = [
        ["claim", "threads", "cases", "mean", "of passes", "highest", "bar [of a case]", "holds"]
    ]
    for entry in verdicts(rows):
        average, highest = (_value(entry[it], entry["unit"]) for it in ("mean", "highest"))
        what = [f"{entry['title']} / {entry['peer']}", str(entry["threads"]), str(entry["cases"])]
        numbers = [average, _range(entry), highest]
        claims.append([*what, *numbers, _bar(entry), _holds(entry["holds"])])
    return f"{_aligned(cases)}\n\n{_aligned(claims)}"


def markdown(*reports: Sequence[Mapping[str, Any]]) -> str:
    """One line per claim: the mean and the highest case, on every machine at every thread count.

    Args:
        reports: the rows of each machine.
    """
    machines = [rows[0]["device"].split(", ")[-2] for rows in reports]
    columns: list[dict[str, dict[str, Any]]] = []
    heads = ["ours", "against", "cases"]
    for machine, rows in zip(machines, reports, strict=True):
        entries = verdicts(rows)
        for n in sorted({entry["threads"] for entry in entries}):
            columns.append({entry["claim"]: entry for entry in entries if entry["threads"] == n})
            heads.append(f"{machine}, {n} thread{'s' * (n > 1)}")
    lines = [[*heads, "bar"], ["---"] * (len(heads) + 1)]
    for key in (key for key in CLAIMS if any(key in column for column in columns)):
        first = next(column[key] for column in columns if key in column)
        cells = [_cell(column[key]) if key in column else "-" for column in columns]
        lines.append([first["title"], first["peer"], str(first["cases"]), *cells, _bar(first)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    passes = max(len(rows[0]["passes"]) for rows in reports)
    spread = ", and the lowest and highest mean of all passes" if passes > 1 else ""
    where = "; ".join(f"{r[0]['device']}, torch {r[0]['torch']}, {r[0]['date']}" for r in reports)
    return (
        f"{table}\n\nTime of ours over time of the peer: geometric mean over the cases (highest of "
        f"them){spread}, against the bar [of any single case]; bold where it is missed. {where}."
    )


def _cell(entry: Mapping[str, Any]) -> str:
    number = _value(entry["mean"], entry["unit"])
    if entry["cases"] > 1:
        number += f" ({_value(entry['highest'], entry['unit'])})"
    low, high = entry["spread"]
    if low != high:
        number += f", {_range(entry)}"
    return f"**{number}**" if entry["holds"] is False else number


if __name__ == "__main__":
    print(markdown(*(read_json(path)["rows"] for path in sys.argv[1:] or [RESULTS])))
