"""Report: every finding of one run, as a table for people and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .check import Finding, Status

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EXCEPTIONS", "Report", "Skipped", "Summary", "table"]

#: The case of findings against a backend's exceptions file.
EXCEPTIONS = "exceptions"

#: Worst first: what a summary shows of a mixture.
_ORDER = (Status.ERROR, Status.FAIL, Status.PASS, Status.DECLINED)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that could not be tried at all here, and why (another device, an engine, the slower tier)."""

    check: str
    why: str


@dataclass(frozen=True, slots=True)
class Summary:
    """All findings of one check: how many of each status, the worst of them, and the worst ratio."""

    check: str
    status: Status
    counts: dict[Status, int]
    ratio: float | None
    seconds: float

    @classmethod
    def of(cls, check: str, findings: Sequence[Finding]) -> Summary:
        counts = {status: sum(1 for f in findings if f.status is status) for status in Status}
        worst = next(status for status in _ORDER if counts[status])
        ratios = [f.ratio for f in findings if f.ratio is not None]
        return cls(check, worst, counts, max(ratios, default=None), sum(f.seconds for f in findings))

    @property
    def label(self) -> str:
        """``"pass 12 (0.41)"``, ``"pass 10, declined 2"``, ``"FAIL 1 of 12 (3.2)"``."""
        total = sum(self.counts.values())
        worst = "" if self.ratio is None else f" ({self.ratio:.2g})"
        bad = self.counts[Status.FAIL] + self.counts[Status.ERROR]
        if bad:
            return f"{self.status.upper()} {bad} of {total}{worst}"
        parts = [f"{s} {self.counts[s]}" for s in (Status.PASS, Status.DECLINED) if self.counts[s]]
        return ", ".join(parts) + worst


@dataclass(frozen=True, slots=True)
class Report:
    """What the suite found about one backend (and one config, or its defaults).

    Attributes:
        op, backend, config: what was examined; ``config`` is a label.
        findings: in the order they were made.
        skipped: checks that could not be tried here.
        titles: id to title of every check considered.
        excused: id to reason of the relaxations in force.
        place: what it ran on: ``cpu``, the GPU's name, or the engine's.
    """

    op: str
    backend: str
    config: str
    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]
    titles: dict[str, str]
    excused: dict[str, str]
    place: str = "cpu"

    def joined(self, rest: Report) -> Report:
        """This report with what ``rest`` found of the checks that could not be tried here."""
        return replace(
            self,
            findings=(*self.findings, *rest.findings),
            skipped=rest.skipped,
            titles=self.titles | rest.titles,
            excused=self.excused | rest.excused,
            place=f"{self.place}, {rest.place}",
        )

    @classmethod
    def of_parts(cls, parts: Sequence[Report]) -> Report:
        """Of one subject, from reports of a check or more each, in the order of the checks.

        What is wrong with its exceptions is found by each, and kept once. A part whose process died may not know the
        place's name; others do.
        """
        findings: dict[tuple[object, ...], Finding] = {}
        for number, part in enumerate(parts):
            for place, finding in enumerate(part.findings):
                alike = finding.case == EXCEPTIONS
                key = (finding.check, finding.message) if alike else (number, place)
                findings.setdefault(key, finding)
        return replace(
            parts[0],
            findings=tuple(findings.values()),
            skipped=tuple(skipped for part in parts for skipped in part.skipped),
            titles={check: title for part in parts for check, title in part.titles.items()},
            excused={check: reason for part in parts for check, reason in part.excused.items()},
            place=next((part.place for part in parts if part.place), ""),
        )

    @property
    def ok(self) -> bool:
        """At least one pass (a run that ran nothing is no success), and nothing that speaks against the backend."""
        return not self.failures and any(f.status is Status.PASS for f in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """Findings with status ``fail`` or ``error``."""
        return tuple(f for f in self.findings if f.status in (Status.FAIL, Status.ERROR))

    @property
    def undeclared(self) -> tuple[str, ...]:
        """Checks of which the backend declines every case, without saying so in its exceptions.

        A specialised backend may; for a general one it means that a check examined nothing.
        """
        found = self.summaries().values()
        return tuple(s.check for s in found if s.status is Status.DECLINED and s.check not in self.excused)

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """Ids of the checks with failures, in order."""
        return tuple(dict.fromkeys(f.check for f in self.failures))

    @property
    def seconds(self) -> float:
        return sum(f.seconds for f in self.findings)

    def summaries(self) -> dict[str, Summary]:
        """One summary per check that made findings, by id."""
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(finding.check, []).append(finding)
        return {check: Summary.of(check, group) for check, group in groups.items()}

    def describe_failures(self, most: int = 20) -> str:
        """A line per failure, for assertion messages and logs; says so where nothing ran at all."""
        if not self.failures and not self.ok:
            return "nothing ran: every case is declined or skipped"
        lines = [f"{f.check} [{f.case}] {f.status}: {f.message}" for f in self.failures[:most]]
        left = len(self.failures) - len(lines)
        return "\n".join(lines + ([f"... and {left} more"] if left > 0 else []))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; infinite and undefined ratios become strings (``"inf"``, ``"nan"``)."""
        data = asdict(self)
        data["ok"] = self.ok
        data["undeclared"] = list(self.undeclared)
        data["findings"] = [finding.to_dict() for finding in self.findings]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`."""
        return cls(
            op=data["op"],
            backend=data["backend"],
            config=data["config"],
            findings=tuple(map(Finding.from_dict, data["findings"])),
            skipped=tuple(Skipped(**s) for s in data["skipped"]),
            titles=dict(data["titles"]),
            excused=dict(data["excused"]),
            place=data["place"],
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False)


_STYLE = {Status.PASS: "green", Status.DECLINED: "yellow", Status.FAIL: "bold red", Status.ERROR: "bold red"}


def table(reports: Iterable[Report]) -> Table:
    """Checks down, backends across: counts, worst status, worst ratio to the error bound in parentheses."""
    from rich.table import Table
    from rich.text import Text

    reports = list(reports)
    op = ", ".join(dict.fromkeys(r.op for r in reports))
    grid = Table(title=f"conformance of {op}", caption="in parentheses: worst error in units of its bound")
    grid.add_column("check", no_wrap=True)
    grid.add_column("what must hold")
    for report in reports:
        name = report.backend if report.config == "default" else f"{report.backend} [{report.config}]"
        grid.add_column(Text(f"{name}\n{report.place}"))
    titles: dict[str, str] = {}
    for report in reports:
        titles.update(report.titles)
    summaries = [report.summaries() for report in reports]
    for check, title in titles.items():
        cells = [_cell(report, found, check) for report, found in zip(reports, summaries, strict=True)]
        grid.add_row(check, Text(title), *cells)
    return grid


def _cell(report: Report, found: dict[str, Summary], check: str) -> Any:
    from rich.text import Text

    if check not in found:
        return Text("not run", style="dim")
    summary = found[check]
    mark = " *" if check in report.excused else ""
    return Text(summary.label + mark, style=_STYLE[summary.status])
