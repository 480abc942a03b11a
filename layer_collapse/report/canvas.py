"""The paper that charts are drawn on, without pyplot: nothing is shared with the caller's plots.

A chart becomes a PNG on white, for print, or on a dark page, and an SVG whose ink follows the page.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

__all__ = [
    "INK",
    "End",
    "label_ends",
    "new_axes",
    "printable",
    "render",
    "render_all",
    "say_nothing",
    "style_axes",
]

_DPI = 200
INK, FAINT = "#24292f", "#d5dae0"  # text and grid on white
_DARK_INK, _DARK_FAINT, _DARK_PAGE = "#d8dee6", "#3a424c", "#0d1117"
_RC: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a "$" in a name is a "$"
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "layer_collapse",  # the same report gives the same bytes
}
_LONGEST_LABEL = 28  # characters

End = tuple[float, float, str, str]
"""Where a line ends, and what to write there: (x, y, name, colour)."""


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of ``width`` x ``height`` inches and its axes, with only faint lines."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Give axes only faint lines and the page's ink."""
    axes.set_axisbelow(True)
    axes.grid(color=FAINT, lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def say_nothing(figure: Figure, axes: Axes, why: str) -> Figure:
    """Return the figure with nothing on it but the reason."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", color=INK, transform=axes.transAxes)
    return figure


def printable(name: str) -> str:
    """Return ``name`` with control codes, which SVG forbids, shown as question marks."""
    return "".join(c if c.isprintable() else "?" for c in name)


def label_ends(axes: Axes, ends: list[End], gap: float) -> None:
    """Write the name of each line to the right of the axes, close to its end and not overlapping.

    Args:
        axes: limits already set.
        ends: one per line.
        gap: least distance of two labels, as a part of the height of the axes.
    """
    low, high = axes.get_ylim()
    # Equal ends: the first of them on top.
    ends = sorted(ends, key=lambda end: end[1], reverse=True)[::-1]
    # Push up from the bottom, then down from the top: a few passes over sorted heights.
    heights = [(y - low) / (high - low) for _, y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = max(1.0, gap * (len(heights) - 1))
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling - gap * (len(heights) - 1 - i))
    for (x, y, name, colour), height in zip(ends, heights, strict=True):
        short = (
            name if len(name) <= _LONGEST_LABEL else name[:13] + "…" + name[14 - _LONGEST_LABEL :]
        )
        axes.annotate(
            printable(short),
            xy=(x, y),
            xytext=(1.06, height),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6}
            | {"relpos": (0.0, 0.5), "shrinkA": 1.0, "shrinkB": 3.0},
        )


def render(draw: Callable[[dict[str, Any]], Figure], report: dict[str, Any]) -> tuple[bytes, bytes]:
    """Draw a chart of ``report``.

    Returns:
        The PNG (on white, 200 dpi) and the SVG (clear, in the page's ink).
    """
    drawn = render_all(partial(draw, report), dark=False)
    return drawn[".png"], drawn[".svg"]


def render_all(draw: Callable[[], Figure], dark: bool = True) -> dict[str, bytes]:
    """Draw a chart.

    Returns:
        By how the file's name ends: ".png" (on white, 200 dpi), ".svg" (clear, in the page's ink)
        and, with ``dark``, "-dark.png".
    """
    png, night, svg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with mpl.rc_context(_RC):
        figure = draw()
        options: dict[str, Any] = {"format": "png", "dpi": _DPI, "metadata": {"Software": None}}
        figure.savefig(png, facecolor="white", **options)
        figure.set_layout_engine("none")  # it is laid out now, and that takes most of the time
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        if dark:
            _darken(figure)
            figure.savefig(night, facecolor=_DARK_PAGE, **options)
    text = svg.getvalue().decode("utf-8")
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    style = (
        f"<style>svg{{--ink:{INK};--faint:{FAINT}}}@media (prefers-color-scheme:dark)"
        f"{{svg{{--ink:{_DARK_INK};--faint:{_DARK_FAINT}}}}}</style>"
    )
    drawn = {
        ".png": _smaller(png),
        ".svg": text.replace("<defs>", style + "<defs>", 1).encode("utf-8"),
    }
    return drawn | ({"-dark.png": _smaller(night)} if dark else {})


def _smaller(png: io.BytesIO) -> bytes:
    """The picture with a palette of 256 colours, a third of the bytes: folders of results have
    hundreds, and a drawn figure shows no difference.
    """
    small = io.BytesIO()
    picture = Image.open(png).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True, dpi=(_DPI, _DPI)
    )
    return small.getvalue()


def _darken(figure: Figure) -> None:
    """Exchange ink and grid for those of a dark page; all other colours stay."""
    exchanged = {
        mpl.colors.to_rgba(INK): _DARK_INK,
        mpl.colors.to_rgba(FAINT): _DARK_FAINT,
        mpl.colors.to_rgba("white"): _DARK_PAGE,
    }
    for artist in figure.findobj():
        for what in ("color", "facecolor", "edgecolor"):
            get, put = (getattr(artist, f"{verb}_{what}", None) for verb in ("get", "set"))
            if get is None or put is None:
                continue
            before = get()
            one = isinstance(before, str) or (len(before) and not hasattr(before[0], "__len__"))
            colours = {mpl.colors.to_rgba(c) for c in ([before] if one else before)}
            if len(colours) == 1 and (colour := colours.pop()) in exchanged:
                put(exchanged[colour])
