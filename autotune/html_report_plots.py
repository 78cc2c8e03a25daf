"""Plots of a report as SVG that takes its colours from the page, so that it is right on light and on dark.

Needs matplotlib (``pip install 'isokern[report]'``). Colours are drawn as placeholders and replaced by the page's
variables afterwards; text stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .html_report_data import Tuned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["available", "margins_plot", "times_plot"]

#: What is drawn, and what the page calls it. Backends get ``--c0`` to ``--c7``.
_INK, _MUTED, _GRID, _GROUND = "#010101", "#020202", "#030303", "#040404"
_NAMES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--line)", _GROUND: "var(--ground)"}
_SERIES = 8
_MARKERS = "os^DvPX*"
_CLASSES = ("decode", "uniform", "mild", "heavy", "unknown")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


def available() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def _series(number: int) -> str:
    return f"#0500{number % _SERIES:02x}"


def times_plot(problems: Sequence[Tuned], colours: Mapping[str, int], bound: str) -> str:
    """Time per call over tokens, a panel per length class: of each backend the fastest config that is correct.

    Args: problems: of one layer and one launch mode. colours: number of each backend. bound: seed of the SVG's ids.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    classes = [c for c in _CLASSES if any(p.length_class == c for p in problems)]
    style: Any = _STYLE | {"svg.hashsalt": bound}
    with mpl.rc_context(style):
        figure = Figure(figsize=(max(4.2, 3.0 * len(classes)), 3.0), layout="constrained")
        panels = figure.subplots(1, len(classes), sharey=True, squeeze=False)[0]
        drawn: dict[str, Any] = {}
        for panel, name in zip(panels, classes, strict=True):
            _times_panel(panel, [p for p in problems if p.length_class == name], colours, drawn)
            panel.set_title(name, loc="left")
            panel.set_xlabel("tokens per call (bucket)")
        panels[0].set_ylabel("median time per call")
        handles = [drawn[backend] for backend in sorted(drawn)]
        figure.legend(handles=handles, loc="outside upper left", ncols=8, fontsize=8, handletextpad=0.2)
        return _svg(figure)


def _times_panel(panel: Axes, problems: Sequence[Tuned], colours: Mapping[str, int], drawn: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter

    points: dict[str, list[tuple[int, float, bool]]] = {}
    for problem in problems:
        best: dict[str, float] = {}
        for c in problem.candidates:
            if c.median_us and c.status in ("chosen", "ok", "slower"):
                best[c.backend] = min(best.get(c.backend, math.inf), c.median_us)
        if problem.median_us:
            best[problem.backend] = problem.median_us
        for backend, us in best.items():
            points.setdefault(backend, []).append((max(1, problem.tokens), us, backend == problem.backend))
    for backend, found in sorted(points.items()):
        number = colours[backend]
        marker, colour = _MARKERS[number % len(_MARKERS)], _series(number)
        for won in (False, True):
            some = [(tokens, us) for tokens, us, winner in found if winner is won]
            if some:
                xs, ys = zip(*some, strict=True)
                face = colour if won else _GROUND
                handle = panel.scatter(xs, ys, s=26, marker=marker, edgecolors=colour, facecolors=face, linewidths=1.2)
                handle.set_label(backend)
                if won or backend not in drawn:
                    drawn[backend] = handle
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(_time_tick))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()


def _time_tick(us: float, _: int) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)):
        if us >= size * 0.999:
            return f"{us / size:g} {unit}"
    return f"{us * 1e3:g} ns"


def margins_plot(problems: Sequence[Tuned], bar: float, bound: str) -> str:
    """How many times the winner's time the runner-up and the default take, a row per launch mode and length class.

    Args: bar: of the promotion policy, as a fraction. bound: seed of the SVG's ids.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    rows = sorted({(p.mode, _CLASSES.index(p.length_class), p.length_class) for p in problems}, reverse=True)
    style: Any = _STYLE | {"svg.hashsalt": bound}
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.2, 1.3 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, (mode, _, name) in enumerate(rows):
            members = [p for p in problems if (p.mode, p.length_class) == (mode, name)]
            for offset, attribute, filled in ((0.14, "over_default", True), (-0.14, "over_runner_up", False)):
                ratios = [1 + value for p in members if (value := getattr(p, attribute)) is not None]
                face = _series(0) if filled else _GROUND
                axes.scatter(ratios, [y + offset] * len(ratios), s=24, facecolors=face, edgecolors=_series(0))
        axes.axvline(1.0, color=_MUTED, linewidth=1.0)
        axes.axvline(1.0 + bar, color=_series(1), linewidth=1.0, linestyle="--")
        axes.set_yticks(range(len(rows)), [f"{mode}, {name}" for mode, _, name in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.7), max(high, 2.2))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("time of the other over the winner's")
        key = [("the heuristic default", _series(0), _series(0)), ("the runner-up", _GROUND, _series(0))]
        handles: list[Any] = [axes.scatter([], [], s=24, facecolors=f, edgecolors=e, label=text) for text, f, e in key]
        handles.append(
            axes.plot([], [], color=_series(1), linestyle="--", label=f"bar to replace: {100 * bar:.0f} %")[0]
        )
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8, handletextpad=0.3)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element without a prologue, its placeholders replaced by the page's variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    names = _NAMES | {_series(number): f"var(--c{number})" for number in range(_SERIES)}
    for placeholder, name in names.items():
        text = text.replace(placeholder, name)
    # The page decides on size and font; the viewBox keeps the proportions.
    widest = f' style="max-width: {figure.get_figwidth() * 6.5:.0f}rem"'
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf"\1{widest}", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1, flags=re.DOTALL)
    # Several drawings share the page: only the ids that a drawing refers to stay, and those differ with its salt.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 inherit", text)
    return re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
