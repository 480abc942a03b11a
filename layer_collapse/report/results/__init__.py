"""What came out of the experiments: results.json, tables, figures for light and dark pages.

The JSON file is the truth; page and figures show it. The page keeps what people wrote around its
generated part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ... import files
from ..canvas import render_all
from . import charts, tables
from .summary import Results, summary

__all__ = ["write"]

BEGIN, END = "<!-- generated: everything down to the end mark is written anew -->", "<!-- end -->"
_NEW = f"""# Results of the experiments

## Reading

(Not written yet: what these numbers mean, and where they fall short.)

{BEGIN}
{END}
"""


def write(out: Path, results: Results, version: str, quick: bool) -> Path:
    """Write ``results.json``, the figures and ``README.md`` into ``out``, each atomically.

    Args:
        out: folder, created where it is missing.
        results: cells that are there.
        version: of the code that computed them.

    Returns:
        The page.

    Raises:
        ValueError: ``README.md`` is there without the marks of its generated part; it stays as it
            is.
        OSError: a file cannot be written.
    """
    content: dict[str, Any] = {
        "command": f"layer-collapse bench-paper --suite all {'--quick' if quick else '--full'}",
        "quick": quick,
        "code": version,
        "torch": ", ".join(sorted({r["torch"] for _, r in results if "torch" in r})),
        "threads": sorted({r["threads"] for _, r in results if "threads" in r}),
        "networks": summary(results),
    }
    out.mkdir(parents=True, exist_ok=True)
    page = out / "README.md"
    before = page.read_text("utf-8") if page.exists() else _NEW
    if (
        before.count(BEGIN) != 1
        or before.count(END) != 1
        or before.index(BEGIN) > before.index(END)
    ):
        raise ValueError(
            f"{page} has not exactly one line {BEGIN!r} with a line {END!r} below it; add them "
            "where tables and figures belong, or move the file away"
        )
    files.write_json(out / "results.json", content)
    content = json.loads(files.to_json(content))  # what a reader of the file sees
    networks = content["networks"]
    for name, network in networks.items():
        for key, title in tables.figures_of(network).items():
            draw = partial(charts.captioned, charts.CHARTS[key], title, name, network)
            _store(out / f"{name}-{key}", draw)
    _store(out / "frontier", partial(charts.frontiers, networks))
    head, _, rest = before.partition(BEGIN)
    text = f"{head}{BEGIN}\n\n{tables.page(content)}\n\n{END}{rest.partition(END)[2]}"
    files.write_atomically(page, text)
    return page


def _store(path: Path, draw: Callable[[], Figure]) -> None:
    for ending, data in render_all(draw).items():
        files.write_atomically(path.with_name(path.name + ending), data)
