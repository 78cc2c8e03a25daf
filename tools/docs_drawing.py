"""Plots as SVG inside a page: text stays text, and whatever is not data has the colour of the page's own text."""

from __future__ import annotations

import html
import io
import re
from typing import Any

from .docs_plots import FLOOR, Panel, Plot, Series

__all__ = ["COLOURS", "draw", "figure", "series_id"]

#: Each stands out from a white and from a dark page, and from the others for who does not tell red from green.
COLOURS = ("#b5651d", "#2b7fc0", "#108a6c", "#b75d9b", "#8378d8", "#8a7a14")
_MARKERS = ("o", "s", "^", "D", "v", "P")
#: Stands for the text's colour while matplotlib draws, since it takes no ``currentColor``.
_TEXT = "#010203"
_ID = re.compile(r' id="([^"]*)"')
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)


def figure(plot: Plot) -> str:
    """The plot with its caption, as HTML."""
    caption = f"{html.escape(plot.text)}; {html.escape(plot.source)}."
    return f'<figure class="plot">\n{draw(plot)}<figcaption>{caption}</figcaption>\n</figure>'


def series_id(plot: Plot, panel: int, series: int) -> str:
    """The id of the group that holds a series' marks, one per point."""
    return f"{plot.name}-{panel}-{series}"


def draw(plot: Plot) -> str:
    """An ``<svg>`` element, the same for the same data and matplotlib."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.name,  # ids that differ from those of other plots on a page
        "font.family": "sans-serif",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
        "grid.color": _TEXT,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        drawn = Figure(figsize=_size(plot), layout="constrained")
        FigureCanvasSVG(drawn)
        grid = drawn.subplots(1, len(plot.panels), sharey=True, squeeze=False)
        for number, (axes, panel) in enumerate(zip(grid[0], plot.panels, strict=True)):
            axes.set_title(panel.title, fontsize=9)
            {"lines": _lines, "dots": _dots, "bars": _bars}[plot.kind](axes, plot, number, panel)
        handles, labels = grid[0][0].get_legend_handles_labels()
        columns = len(labels) if len("".join(labels)) < 60 else 3
        drawn.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
        text = io.StringIO()
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), plot)


def _size(plot: Plot) -> tuple[float, float]:
    if plot.kind == "lines":
        return 8.0, 3.6
    places = _places(plot.panels[0])
    lines = len(places) * (len(plot.panels[0].series) if plot.kind == "bars" else 1.6)
    return 8.0, 1.2 + 0.2 * lines


def _places(panel: Panel) -> list[str]:
    """The categories, as they come."""
    return list(dict.fromkeys(str(point.at) for series in panel.series for point in series.points))


def _looks(panel: Panel) -> list[tuple[Series, dict[str, Any]]]:
    """Each series with its colour and marker; the floor is no implementation and takes the text's."""
    looks, left = [], iter(zip(COLOURS, _MARKERS, strict=True))
    for series in panel.series:
        colour, marker = (_TEXT, "|") if series.label == FLOOR else next(left)
        looks.append((series, {"color": colour, "marker": marker}))
    return looks


def _lines(axes: Any, plot: Plot, number: int, panel: Panel) -> None:
    for index, (series, look) in enumerate(_looks(panel)):
        floor = {"linestyle": "--", "marker": "_"} if series.label == FLOOR else {"fillstyle": "none"}
        at, values = [float(point.at) for point in series.points], [point.value for point in series.points]
        line = axes.plot(at, values, label=series.label, linewidth=1.2, **{**look, **floor})[0]
        line.set_gid(series_id(plot, number, index))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = sorted({float(point.at) for series in panel.series for point in series.points})
    axes.set_xticks(places, [f"{at:g}" for at in places])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(plot.at)
    if number == 0:
        axes.set_ylabel(plot.unit)
    axes.grid(True)


def _dots(axes: Any, plot: Plot, number: int, panel: Panel) -> None:
    places = _places(panel)
    for index, (series, look) in enumerate(_looks(panel)):
        values = [point.value for point in series.points]
        rows = [places.index(str(point.at)) for point in series.points]
        size = {"markersize": 12, "markeredgewidth": 2} if series.label == FLOOR else {"markersize": 6}
        line = axes.plot(values, rows, label=series.label, linestyle="", **{**look, **size})[0]
        line.set_gid(series_id(plot, number, index))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-0.6, len(places) - 0.4)
    _categories(axes, plot, places)


def _bars(axes: Any, plot: Plot, number: int, panel: Panel) -> None:
    places = _places(panel)
    bottom = 0.0
    ticks = []
    for place in places:
        here = [(i, s, look) for i, (s, look) in enumerate(_looks(panel)) if any(p.at == place for p in s.points)]
        ticks.append(bottom + (len(here) - 1) / 2)
        for offset, (index, series, look) in enumerate(here):
            point = next(p for p in series.points if p.at == place)
            seen = series.label in axes.get_legend_handles_labels()[1]
            label = {} if seen else {"label": series.label}
            bars = axes.barh(bottom + offset, point.value, height=0.85, color=look["color"], **label)
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
            bars[0].set_gid(f"{series_id(plot, number, index)}-{series.points.index(point)}")
        bottom += len(here) + 0.8
    axes.margins(x=0.1)
    _categories(axes, plot, places, ticks)


def _categories(axes: Any, plot: Plot, places: list[str], ticks: list[float] | None = None) -> None:
    """Categories from top to bottom, values from left to right."""
    axes.set_yticks(range(len(places)) if ticks is None else ticks, places)
    axes.invert_yaxis()
    axes.set_xlabel(plot.unit)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)


def _inline(svg: str, plot: Plot) -> str:
    """For use inside a page: no prologue, as wide as the page, ids of this plot only, the page's text colour."""
    svg = _HEAD.sub("", svg, count=1)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    used = set(re.findall(r'(?:#|href="#)([\w-]+)', svg))
    svg = _ID.sub(lambda m: m[0] if m[1] in used or m[1].startswith(f"{plot.name}-") else "", svg)
    label = html.escape(plot.text, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).replace(_TEXT, "currentColor")
