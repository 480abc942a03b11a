"""The page: one HTML file that needs neither network nor scripts.

A value from ``report.json`` stands in an element whose ``data-key`` is its place there (parts
joined by dots; a dot or backslash inside a part is escaped by a backslash) and whose
``data-value`` is its exact JSON text. A value computed from two others names its terms in
``data-derived``. So whatever the page says can be checked against the file.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from layer_collapse.report.text import CUT, difference, format_value, headline, layer_names, ratio

__all__ = ["render"]


def render(report: dict[str, Any], charts: dict[str, bytes]) -> str:
    """Return the page as HTML.

    Args:
        report: the report as read back from JSON.
        charts: SVG text by chart name.
    """

    def lookup(path: tuple[str | int, ...]) -> Any:
        node: Any = report
        for part in path:
            node = node[part]
        return node

    def show(*path: str | int, style: str = "plain", missing: str = "not run") -> Markup:
        """Return the value at ``path`` with its data attributes."""
        value = lookup(path)
        key = ".".join(str(part).replace("\\", "\\\\").replace(".", "\\.") for part in path)
        return Markup('<span data-key="{}" data-value="{}">{}</span>').format(
            key, _json(value), format_value(value, style, missing)
        )

    def derived(a: str, operator: str, b: str, style: str, missing: str = "-") -> Markup:
        """Return a - b or a / b, for keys without dots in their parts."""
        compute = {"-": difference, "/": ratio}[operator]
        value = compute(lookup(tuple(a.split("."))), lookup(tuple(b.split("."))))
        return Markup('<span data-derived="{} {} {}" data-value="{}">{}</span>').format(
            a, operator, b, _json(value), format_value(value, style, missing)
        )

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files(__package__).joinpath("template.html.j2").read_text("utf-8")
    return environment.from_string(template).render(
        r=report,
        show=show,
        derived=derived,
        ratio=ratio,
        title=headline(report),
        cut_text=CUT,
        layer_names=layer_names(report),
        leaves=_leaves,
        charts={name: base64.b64encode(svg).decode("ascii") for name, svg in charts.items()},
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _leaves(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every scalar (or empty container) at or below ``node``."""
    if isinstance(node, (dict, list)) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, (*path, key))
    else:
        yield path
