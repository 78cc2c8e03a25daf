"""From stored entries to what a report shows: grouped, counted and in words. No markup here, and no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..cache.candidate import CandidateRecord
from ..cache.entry import Entry
from ..cache.environment import Environment
from ..cache.found import Located

__all__ = [
    "CandidateLine",
    "Layer",
    "Map",
    "Rejection",
    "Section",
    "Summary",
    "Tuned",
    "format_margin",
    "format_percent",
    "format_us",
    "sections",
]

#: Key fields that tell one problem of a layer from another; all others say whose layer it is.
_VARYING = ("mode", "n", "tokens", "longest", "length_class", "intermediates", "intermediate_dtype", "update")
#: Length classes in the order of increasing spread, as a reader meets them.
_CLASSES = ("decode", "uniform", "mild", "heavy", "unknown")
#: A rejection that says nothing against a candidate: it is right, and another is faster.
SLOW = "slow"


def format_us(us: float | None) -> str:
    """Microseconds in the unit an engineer would use, three digits: ``"39.2 µs"``, ``"4.17 ms"``."""
    if us is None:
        return "–"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs" if us >= 1 else f"{us * 1e3:.3g} ns"


def format_percent(fraction: float | None) -> str:
    """``0.123`` as ``"12.3 %"``, as a factor from 2x on; a dash for None."""
    if fraction is None:
        return "–"
    return f"{1 + fraction:.1f}×" if fraction >= 1 else f"{100 * fraction:.1f} %"


def format_margin(fraction: float | None) -> str:
    """By how much the other one is slower, with its sign: ``"+7.9 %"``; as a factor of time from 2x on: ``"2.4×"``."""
    if fraction is None:
        return "–"
    return format_percent(fraction) if fraction >= 1 else f"{100 * fraction:+.1f} %"


@dataclass(frozen=True, slots=True)
class CandidateLine:
    """One candidate of one problem.

    Attributes:
        label, backend: ``backend[config]``. status: ``chosen``, ``ok``, ``slower``, ``refused`` or ``declined`` (its
            predicate says no). code, reason: why not. median_us, samples: of its times. low_us, high_us: their
            quartiles. relative: median over the chosen one's.
    """

    label: str
    backend: str
    status: str
    code: str
    reason: str
    median_us: float | None
    samples: int
    low_us: float | None
    high_us: float | None
    relative: float | None
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tuned:
    """One problem and its outcome.

    Attributes:
        anchor: name of its place in the page. n, tokens, longest: buckets, upper bounds. activity: ``""``, or what is
            done with the states in verification. default: the label of the heuristic default, "" if unknown.
        over_runner_up, over_default: margins, as fractions of the other's time. regret: how much slower the
            choice is than the fastest candidate that stayed in the race to its end, by median.
    """

    anchor: str
    mode: str
    length_class: str
    activity: str
    n: int
    tokens: int
    longest: int | None
    winner: str
    backend: str
    median_us: float | None
    over_runner_up: float | None
    over_default: float | None
    regret: float
    rule: str
    candidates: tuple[CandidateLine, ...]
    seconds: float
    method: str
    layer_name: str

    @property
    def title(self) -> str:
        """``"decode, N ≤ 64, tokens ≤ 64"``, where no line breaks after a "≤"."""
        longest = "" if self.longest is None or self.length_class == "decode" else f", longest ≤ {self.longest}"
        activity = f", {self.activity}" if self.activity else ""
        return f"{self.length_class}, N ≤ {self.n}, tokens ≤ {self.tokens}{longest}{activity}".replace(
            "≤ ", "≤\N{NBSP}"
        )

    def count(self, *statuses: str) -> int:
        """Candidates with one of ``statuses``."""
        return sum(c.status in statuses for c in self.candidates)


@dataclass(frozen=True, slots=True)
class Map:
    """Winners over (N, tokens) for one launch mode, length class and activity.

    Attributes: ``rows``, buckets of N; ``columns``, buckets of tokens; ``cells[row][column]``, the problems there (more
    than one where they differ in the longest sequence).
    """

    mode: str
    length_class: str
    activity: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    cells: tuple[tuple[tuple[Tuned, ...], ...], ...]

    @property
    def strip(self) -> tuple[Tuned, ...] | None:
        """The problems in a line, if no two cells share a row or a column (as in decode, where tokens are N)."""
        filled = [[bool(cell) for cell in row] for row in self.cells]
        if any(sum(row) > 1 for row in filled) or any(sum(column) > 1 for column in zip(*filled, strict=True)):
            return None
        return tuple(p for row in self.cells for cell in row for p in cell)


@dataclass(frozen=True, slots=True)
class Layer:
    """The problems of one shape of layer: ``title`` in words, ``facts`` the other fields of its keys."""

    title: str
    facts: tuple[tuple[str, str], ...]
    problems: tuple[Tuned, ...]
    maps: tuple[Map, ...]


@dataclass(frozen=True, slots=True)
class Rejection:
    """One reason for which one candidate was refused: ``problems``, how many times; ``example``, one of the reasons."""

    backend: str
    config: str
    code: str
    problems: int
    example: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts over all problems of a section. Fractions are of time; None where there is nothing to say."""

    problems: int
    winners: tuple[tuple[str, int], ...]
    candidates: int
    declined: int
    slower: int
    refused: int
    over_default: float | None
    kept_default: int
    worst_regret: float
    mean_regret: float
    over_bar: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Section:
    """All that was tuned in one environment: one kind of device with one set of library versions."""

    name: str
    environment: Environment | None
    hash: str
    layers: tuple[Layer, ...]
    rejections: tuple[Rejection, ...]
    declined: tuple[Rejection, ...]
    summary: Summary
    backends: tuple[str, ...]

    @property
    def problems(self) -> tuple[Tuned, ...]:
        return tuple(p for layer in self.layers for p in layer.problems)


def sections(located: Iterable[Located], declined_codes: frozenset[str], bar: float = 0.03) -> tuple[Section, ...]:
    """What there is to show, a section per environment, the one with most problems first.

    Args:
        located: in order of precedence; of one key in one environment the first counts, as in a lookup.
        declined_codes: rejection codes that a predicate gives. bar: of the promotion policy, as a fraction.
    """
    seen: dict[tuple[str, str], Located] = {}
    for item in located:
        seen.setdefault((item.entry.environment, item.entry.key_hash), item)
    by_environment: dict[str, list[Located]] = defaultdict(list)
    for item in seen.values():
        by_environment[item.entry.environment].append(item)
    found = [_section(name, items, declined_codes, bar) for name, items in by_environment.items()]
    return tuple(sorted(found, key=lambda s: (-s.summary.problems, s.hash)))


def _section(name: str, items: Sequence[Located], declined_codes: frozenset[str], bar: float) -> Section:
    environment = next((item.environment for item in items if item.environment is not None), None)
    shapes: dict[tuple[tuple[str, Any], ...], list[Tuned]] = defaultdict(list)
    for item in items:
        fixed = {k: v for k, v in item.entry.key.items() if k not in _VARYING} | {"op": item.entry.op}
        shapes[tuple(sorted(fixed.items()))].append(_tuned(item, declined_codes))
    layers = [_layer(dict(fixed), problems) for fixed, problems in shapes.items()]
    layers.sort(key=lambda layer: (-len(layer.problems), layer.title))
    problems = [p for layer in layers for p in layer.problems]
    return Section(
        name=environment.describe() if environment else "a device whose description is lost",
        environment=environment,
        hash=name,
        layers=tuple(layers),
        rejections=_rejections(problems, "refused"),
        declined=_rejections(problems, "declined"),
        summary=_summary(problems, bar),
        backends=tuple(sorted({c.backend for p in problems for c in p.candidates})),
    )


def _tuned(item: Located, declined_codes: frozenset[str]) -> Tuned:
    entry = item.entry
    key = entry.key
    lines = tuple(_line(entry, c, declined_codes) for c in entry.candidates)
    return Tuned(
        anchor=f"p-{entry.environment[:6]}-{entry.key_hash}",
        mode=str(key.get("mode", entry.measured["policy"])),
        length_class=str(key.get("length_class", "unknown")),
        activity=_activity(key),
        n=int(key.get("n", 0)),
        tokens=int(key.get("tokens", 0)),
        longest=int(key["longest"]) if "longest" in key else None,
        winner=entry.label,
        backend=entry.backend,
        median_us=entry.chosen.median_us,
        over_runner_up=entry.margin_over_runner_up,
        over_default=entry.margin_over_default,
        regret=_regret(entry),
        rule=entry.rule,
        candidates=tuple(sorted(lines, key=_order)),
        seconds=entry.measured["seconds"],
        method=entry.measured["method"],
        layer_name=item.layer_name,
    )


def _activity(key: Mapping[str, Any]) -> str:
    verify = key.get("intermediates", "none")
    parts = [f"verification ({verify})"] if verify != "none" else []
    update = key.get("update", "in_place")
    if update not in ("in_place", "disabled"):
        parts.append({"none": "no state", "separate": "states read and written apart"}.get(update, update))
    return ", ".join(parts)


def _line(entry: Entry, candidate: CandidateRecord, declined_codes: frozenset[str]) -> CandidateLine:
    if candidate == entry.chosen:
        status = "chosen"
    elif candidate.status == "ok":
        status = "ok"
    elif candidate.code in declined_codes:
        status = "declined"
    else:
        status = "slower" if candidate.code == SLOW else "refused"
    best = entry.chosen.median_us
    samples = sorted(candidate.samples_us)
    quartiles = (samples[len(samples) // 4], samples[-1 - len(samples) // 4]) if len(samples) >= 4 else (None, None)
    return CandidateLine(
        label=candidate.label,
        backend=candidate.backend,
        status=status,
        code=candidate.code or "",
        reason=candidate.reason or "",
        median_us=candidate.median_us,
        samples=len(samples),
        low_us=quartiles[0],
        high_us=quartiles[1],
        relative=candidate.median_us / best if candidate.median_us and best else None,
        tags=candidate.tags,
    )


def _order(line: CandidateLine) -> tuple[int, float, str]:
    rank = ("chosen", "ok", "slower", "refused", "declined").index(line.status)
    return (rank, line.median_us or 0.0, line.label)


def _regret(entry: Entry) -> float:
    """What the choice costs against the fastest candidate that stayed in the race to its end.

    One that was eliminated was proven slower in paired blocks; its median, of fewer and other blocks, does not compare.
    """
    mine = entry.chosen.median_us
    raced = [c.median_us for c in entry.candidates if c.samples_us and c.median_us and c.status == "ok"]
    return max(0.0, mine / min(raced) - 1.0) if mine and raced else 0.0


def _layer(fixed: dict[str, Any], problems: list[Tuned]) -> Layer:
    problems.sort(key=lambda p: (p.mode, _class_rank(p.length_class), p.activity, p.n, p.tokens, p.longest or 0))
    groups: dict[tuple[str, str, str], list[Tuned]] = defaultdict(list)
    for problem in problems:
        groups[problem.mode, problem.length_class, problem.activity].append(problem)
    rest = {k: v for k, v in fixed.items() if k not in ("op", "h", "hv", "k", "v", "device", "io_dtype", "state_dtype")}
    return Layer(
        title=_layer_title(fixed),
        facts=tuple((name, str(value)) for name, value in sorted(rest.items())),
        problems=tuple(problems),
        maps=tuple(_map(*name, members) for name, members in groups.items()),
    )


def _layer_title(fixed: Mapping[str, Any]) -> str:
    if "hv" not in fixed:
        return " ".join(f"{name}={value}" for name, value in sorted(fixed.items()))
    gate = "KDA" if fixed.get("is_kda") else "gated delta rule"
    heads = f"{fixed.get('h')} key heads, {fixed['hv']} value heads of {fixed.get('k')}×{fixed.get('v')}"
    state = f"state in {fixed['state_dtype']}" if "state_dtype" in fixed else "no state"
    return f"{fixed['op']}: {gate}, {heads}, {fixed.get('io_dtype')}, {state}"


def _class_rank(name: str) -> int:
    return _CLASSES.index(name) if name in _CLASSES else len(_CLASSES)


def _map(mode: str, length_class: str, activity: str, problems: Sequence[Tuned]) -> Map:
    rows, columns = (tuple(sorted({getattr(p, name) for p in problems})) for name in ("n", "tokens"))
    cells = tuple(
        tuple(tuple(p for p in problems if (p.n, p.tokens) == (row, column)) for column in columns) for row in rows
    )
    return Map(mode, length_class, activity, rows, columns, cells)


def _rejections(problems: Iterable[Tuned], status: str) -> tuple[Rejection, ...]:
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for problem in problems:
        for c in problem.candidates:
            if c.status == status:
                config = c.label.removeprefix(f"{c.backend}[").removesuffix("]")
                groups[c.backend, config, c.code].append(c.reason)
    found = [Rejection(*name, len(reasons), Counter(reasons).most_common(1)[0][0]) for name, reasons in groups.items()]
    return tuple(sorted(found, key=lambda r: (r.code, -r.problems, r.backend, r.config)))


def _summary(problems: Sequence[Tuned], bar: float) -> Summary:
    over = [p.over_default for p in problems if p.over_default is not None]
    count = Counter(c.status for p in problems for c in p.candidates)
    return Summary(
        problems=len(problems),
        winners=tuple(Counter(p.backend for p in problems).most_common()),
        candidates=sum(count.values()) - count["declined"],
        declined=count["declined"],
        slower=count["slower"],
        refused=count["refused"],
        over_default=median(over) if over else None,
        kept_default=sum(p.over_default is None for p in problems),
        worst_regret=max((p.regret for p in problems), default=0.0),
        mean_regret=sum(p.regret for p in problems) / len(problems) if problems else 0.0,
        over_bar=sum(p.regret > bar for p in problems),
        seconds=sum(p.seconds for p in problems),
    )
