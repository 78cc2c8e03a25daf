"""What ``isokern verify`` does: the suite over some backends, said as it goes on, then a table and a JSON report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from rich.console import Console

from ...autotune.compiling import processors
from ...engines.session import EngineSession
from ...errors import ArgumentValueError, UnknownNameError
from .. import backends as registered
from .. import spec as spec_of
from .check import Check, Finding, Tier
from .parallel import Examined, Parallel, sensible_jobs
from .places import DEVICES, choose_places, configs_at, devices_named
from .process import DeviceProcess
from .report import Report, table
from .runner import belongs_elsewhere, run_checks
from .telling import Telling, telling_on

__all__ = ["DEVICES", "verify_backends"]


def verify_backends(
    op: str,
    names: Sequence[str] | None,
    checks: Sequence[str] | None,
    *,
    full: bool,
    every_config: bool,
    report: Path | None,
    out: Console,
    device: str = "auto",
    jobs: int | None = 1,
    imports: Sequence[str] = (),
) -> bool:
    """Judge backends and print the outcome; True if every one conforms.

    A GPU backend runs on the GPU, or, on a machine without one and with ``device="cpu"``, in its CPU engine. With
    ``device="auto"`` what no GPU can check (every address, every schedule) is checked in the engine, so that the table
    has the same rows everywhere. Where ``out`` is no terminal, each check that has ended is a line.

    Args:
        jobs: processes that examine, each a check at a time; None: as many as are worth it here. With 1 devices are
            used by this process; with more, it makes no context on any.
        imports: what those processes import to know backends that are neither built in nor plugins.

    Raises:
        UnknownNameError: an unknown backend or check.
        ArgumentValueError: a device that is not here, or that a named backend does not run on.
        MissingEngineError: a backend to be verified in its CPU engine, which lacks something.
        IsokernError: a named backend whose framework is not installed; a process that does not start.
    """
    tier = Tier.FULL if full else Tier.FAST
    known = {c.id: c for c in spec_of(op).checks()}
    for name in checks or ():
        if name not in known:
            raise UnknownNameError("check", name, known)
    if report is not None:
        _require_writable(report)
    if jobs is None:
        jobs = sensible_jobs(len(names or registered(op)) * len(checks or known))
    if jobs == 1:
        reports = _here(op, names, checks, tier, every_config, device, out)
    else:
        wanted = {name: check for name, check in known.items() if checks is None or name in checks}
        reports = _apart(op, names, wanted, tier, every_config, device, out, jobs, imports)
    out.print(table(reports))
    for r in reports:
        for check, reason in r.excused.items():
            out.print(f"{r.backend}: {check} is relaxed: {reason}", markup=False)
        for skipped in r.skipped:
            out.print(f"{r.backend}: {skipped.check} was not tried: {skipped.why}", markup=False)
        if not r.ok:
            out.print(f"{r.backend} [{r.config}] does not conform:\n{r.describe_failures()}", markup=False)
    if report is not None:
        report.write_text(json.dumps([r.to_dict() for r in reports], indent=1, allow_nan=False) + "\n")
    return bool(reports) and all(r.ok for r in reports)


def _require_writable(report: Path) -> None:
    """Raise ArgumentValueError if the findings could not be kept: it is known before hours of checks, not after."""
    try:
        with report.open("a"):
            pass
    except OSError as error:
        raise ArgumentValueError("--report", "a file that can be written", f"{report} ({error.strerror})") from error


def _here(
    op: str,
    names: Sequence[str] | None,
    checks: Sequence[str] | None,
    tier: Tier,
    every_config: bool,
    device: str,
    out: Console,
) -> list[Report]:
    """All in this process, but what needs an engine."""
    reports = []
    within, telling = telling_on(out)
    with within:
        for place in choose_places(op, names, devices_named(device), belongs_elsewhere, _say_on(out)):
            for config in configs_at(place, every_config):
                subject = Examined(place, config)
                with _Grouped(subject.label, telling) as note:
                    reports.append(_run(op, subject, checks, tier, note))
    return reports


def _apart(
    op: str,
    names: Sequence[str] | None,
    checks: Mapping[str, Check],
    tier: Tier,
    every_config: bool,
    device: str,
    out: Console,
    jobs: int,
    imports: Sequence[str],
) -> list[Report]:
    """In processes: this one asks them even where backends belong."""

    def process() -> DeviceProcess:
        return DeviceProcess(max(1, processors() // jobs), imports)

    within, telling = telling_on(out)
    with process() as first, within:
        places = choose_places(op, names, devices_named(device), first.elsewhere, _say_on(out))
        subjects = [Examined(place, config) for place in places for config in configs_at(place, every_config)]
        return Parallel(op, subjects, checks, tier, jobs, telling, process, [first]).run()


def _say_on(out: Console) -> Callable[[str], None]:
    def say(line: str) -> None:
        out.print(line, markup=False, highlight=False)

    return say


class _Grouped:
    """Hands findings on as they come, and together when the next check's begin."""

    def __init__(self, subject: str, telling: Telling) -> None:
        self._subject = subject
        self._telling = telling
        self._open: list[Finding] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._open:
            self._telling.ended(self._subject, self._open)
        self._telling.finished(self._subject)

    def __call__(self, finding: Finding) -> None:
        if self._open and self._open[0].check != finding.check:
            self._telling.ended(self._subject, self._open)
            self._open = []
        self._open.append(finding)
        self._telling.found(self._subject, finding)


def _run(
    op: str,
    subject: Examined,
    checks: Sequence[str] | None,
    tier: Tier,
    note: Callable[[Finding], None],
) -> Report:
    place, config = subject.place, subject.config
    if place.engine is None:
        report = run_checks(op, place.backend, config, checks, tier, note, device=place.device)
        left = [skipped.check for skipped in report.skipped]
        if place.beside is None or not left:
            return report
        with EngineSession(place.backend.name) as session:
            return report.joined(session.run_checks(left, tier, config, note))
    with EngineSession(place.backend.name) as session:
        return session.run_checks(checks, tier, config, note)
