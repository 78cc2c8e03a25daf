"""``isokern report``: one HTML file about a store, for people who have never seen the tuner.

Self-contained: no scripts, no links to other files. Plots need matplotlib (``isokern[report]``); without it the page
has its tables, and says what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from .. import __version__
from ..cache.files import list_directory, write_atomic
from ..cache.found import Located
from ..cache.journal import Journal
from ..cache.store import Store
from ..registry.accuracy import DEFAULT, policy_of
from . import html_report_plots as plots
from .candidates import PREDICATE_CODES
from .html_report_data import Layer, Section, format_margin, format_percent, format_us, sections
from .html_report_quality import Quality
from .policy import PromotionPolicy
from .report import format_duration
from .warmup import WarmupPlan

__all__ = ["Coverage", "CoverageLine", "coverage_of", "render_report", "unfinished_runs", "write_report"]


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure: ``svg`` is inline SVG."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True, slots=True)
class CoverageLine:
    """One problem of a workload; ``winner`` is "" if it is not tuned."""

    cases: str
    mode: str
    profile: str
    winner: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """A workload against the store; ``command`` tunes what is missing."""

    title: str
    command: str
    lines: tuple[CoverageLine, ...]

    @property
    def known(self) -> int:
        return sum(bool(line.winner) for line in self.lines)


def coverage_of(plan: WarmupPlan) -> Coverage:
    """What ``plan`` says is known and what is not."""
    lines = tuple(
        CoverageLine(
            ", ".join(p.cases), p.task.recipe.mode, p.task.problem.profile.label, p.entry.label if p.entry else ""
        )
        for p in plan.problems
    )
    command, title = f"isokern warmup {plan.arguments}", plan.title
    policies = {policy_of(p.task.problem) for p in plan.problems}
    if len(policies) == 1 and DEFAULT not in policies:
        [under] = policies
        command, title = f"{command} --accuracy {under}", f"{title}, accuracy {under},"
    return Coverage(f"{title} on {plan.device}", command, lines)


def unfinished_runs(store: Store) -> dict[str, list[str]]:
    """Interrupted tuning runs by environment: a line each, of what their journals hold."""
    found: dict[str, list[str]] = {}
    for layer in store.layers:
        for environment in layer.environments():
            for path in list_directory(layer.schema_root / environment / "journal"):
                if path.suffix == ".jsonl":
                    found.setdefault(environment, []).append(_journal_line(path))
    return found


def _journal_line(path: Path) -> str:
    records = Journal(path).records()
    verdicts = [r["verdict"] for r in records if r.get("kind") == "verdict" and isinstance(r.get("verdict"), dict)]
    refused = sum(bool(v.get("rejected")) for v in verdicts)
    events = [r["event"] for r in records if r.get("kind") == "contest" and isinstance(r.get("event"), dict)]
    blocks = sum("block" in event for event in events)
    return f"{path.stem}: {len(verdicts)} candidates judged ({refused} refused), {blocks} blocks of the race"


def render_report(
    located: Iterable[Located],
    *,
    where: str = "",
    unfinished: Mapping[str, Sequence[str]] | None = None,
    coverage: Coverage | None = None,
    quality: Quality | None = None,
    when: datetime | None = None,
) -> str:
    """The page as text.

    Args:
        located: entries in order of precedence. where: what store they come from, in words.
        unfinished: see :func:`unfinished_runs`. quality: of ``benchmarks/choice_quality.py``.
        when: the time it says it was made; None is now.
    """
    bar = PromotionPolicy().min_improvement
    found = sections(located, frozenset(code.value for code in PREDICATE_CODES), bar)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    template = environment.from_string(_resource("html_report.html.j2"))
    return template.render(
        css=Markup(_resource("html_report.css")),
        version=__version__,
        when=(when or datetime.now(UTC)).strftime("%d %B %Y, %H:%M UTC"),
        where=where,
        sections=found,
        plots={section.hash: [_plots(section, layer, bar) for layer in section.layers] for section in found},
        unfinished=dict(unfinished or {}),
        coverage=coverage,
        quality=quality,
        bar=format_percent(bar),
        colour=lambda section, backend: section.backends.index(backend) % 8,
        us=format_us,
        percent=format_percent,
        signed=format_margin,
        setting=lambda label: label[label.index("[") + 1 : -1].replace(",", ", "),
        duration=format_duration,
    )


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plots(section: Section, layer: Layer, bar: float) -> list[Plot]:
    if not plots.available():
        return []
    colours = {backend: number for number, backend in enumerate(section.backends)}
    found = []
    for mode in dict.fromkeys(p.mode for p in layer.problems):
        some = [p for p in layer.problems if p.mode == mode]
        svg = plots.times_plot(some, colours, f"{section.hash}{layer.title}{mode}")
        found.append(
            Plot(
                f"Times, {mode} launch",
                Markup(svg),
                "Of each backend the fastest setting, on every problem where one was timed. Filled marks won. Lower is "
                "better; both axes are logarithmic.",
            )
        )
    svg = plots.margins_plot(layer.problems, bar, f"{section.hash}{layer.title}margins")
    caption = (
        "One mark per problem. Right of 1× the other takes longer than the winner. The default is replaced only by a "
        "candidate that is proven to lie beyond the dashed line; a default that stayed has no mark."
    )
    found.append(Plot("Margins", Markup(svg), caption))
    return found


def write_report(
    out: Path, store: Store, *, plan: WarmupPlan | None = None, quality: Quality | None = None
) -> tuple[int, bool]:
    """Write the page about ``store`` to ``out``.

    Args: plan: a workload to compare with. quality: results of ``benchmarks/choice_quality.py``.

    Returns: how many problems it shows; whether it has plots.

    Raises: OSError: ``out`` cannot be written.
    """
    where = ", ".join(f"{layer.name} store {layer.root}" for layer in store.layers if layer.root.is_dir())
    text = render_report(
        store.entries(),
        where=where or "no store",
        unfinished=unfinished_runs(store),
        coverage=None if plan is None else coverage_of(plan),
        quality=quality,
    )
    write_atomic(out, text)
    return text.count('<details id="p-'), plots.available()
