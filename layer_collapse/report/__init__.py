"""The report of a run: ``report.json``, three charts, and a page that needs nothing else.

The JSON file is the truth; page and charts show it and compute nothing but differences and ratios.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layer_collapse import files
from layer_collapse.report.terminal import summary
from layer_collapse.report.text import checked, headline

__all__ = ["headline", "summary", "write"]


def write(out: Path, report: dict[str, Any]) -> None:
    """Write ``report.json``, ``entropy.png``, ``accuracy.png``, ``before_after.png`` and
    ``report.html`` into ``out``, each atomically.

    Args:
        out: folder, created where it is missing.
        report: every key of the schema (see ``checked`` in ``layer_collapse.report.text``);
            None for what was not run. NaN and infinities become null.

    Raises:
        ValueError: a key is missing.
        TypeError: a value that JSON has no form for.
        OSError: a file cannot be written; ``report.json`` comes first, so it is there if only a
            chart or the page failed.
        ImportError: matplotlib or jinja2 is not installed; ``report.json`` is written all the same.
    """
    # Through JSON and back, so that page and charts see exactly what a reader of the file sees.
    text = files.to_json(checked(report))
    report = json.loads(text)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot create the folder {out}: {error.strerror or error}; choose another"
        ) from error
    files.write_atomically(out / "report.json", text)
    try:
        from layer_collapse.report import canvas, page, plots
    except ImportError as error:
        raise ImportError(
            f"report: charts and page need {error.name}, which is not installed; "
            "run `pip install 'layer-collapse[experiments]'`"
        ) from error
    charts: dict[str, bytes] = {}
    for name, draw in plots.CHARTS.items():
        png, charts[name] = canvas.render(draw, report)
        files.write_atomically(out / f"{name}.png", png)
    files.write_atomically(out / "report.html", page.render(report, charts))
