"""The suite in several processes at once: each runs one check of one backend after another.

Most of a run is compiling, one kernel after another; and what kills a process is a finding against one check only. The
reports are those of a run in one process: findings in the order of the checks, whichever ended first.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from ...autotune.compiling import processors
from ...engines import EngineInfo
from ...engines.session import EngineSession
from ..backend import Config
from .check import Check, Finding, Needs, Tier
from .places import Place
from .process import CheckProcess, DeviceProcess
from .report import Report
from .telling import Telling

__all__ = ["Examined", "Parallel", "sensible_jobs"]

#: Checks that are worth a process of their own, which imports for seconds.
_WORTH = 4


def sensible_jobs(checks: int) -> int:
    """How many processes for so many checks: as many as there are cores, each with a few checks."""
    return max(1, min(processors(), checks // _WORTH))


@dataclass(frozen=True, slots=True)
class Examined:
    """A backend at its place, and one of its configs (None: its defaults)."""

    place: Place
    config: Config | None

    @property
    def label(self) -> str:
        name = self.place.backend.name
        return name if self.config is None else f"{name} [{self.config.label}]"


@dataclass(frozen=True, slots=True)
class _Part:
    """One check of one subject (by number). ``engine``: what runs it; None: the device of its place."""

    subject: int
    check: str
    engine: EngineInfo | None


class Parallel:
    """Runs ``checks`` (by id, in order) of ``subjects`` in ``jobs`` processes, once.

    Args:
        process: makes what runs on devices.
        spare: such processes that are already there, to be used; they are ended with the rest.
    """

    def __init__(
        self,
        op: str,
        subjects: Sequence[Examined],
        checks: Mapping[str, Check],
        tier: Tier,
        jobs: int,
        telling: Telling,
        process: Callable[[], DeviceProcess],
        spare: Sequence[DeviceProcess] = (),
    ) -> None:
        self._op = op
        self._subjects = subjects
        self._checks = checks
        self._tier = tier
        self._telling = telling
        self._process = process
        self._spare = list(spare)
        self._waiting = self._parts()
        self._left = Counter(part.subject for part in self._waiting)
        self._jobs = max(1, min(jobs, len(self._waiting)))
        self._lock = threading.Lock()
        self._stopped = False
        self._processes: list[CheckProcess] = list(spare)
        self._reports: dict[_Part, Report] = {}

    def run(self) -> list[Report]:
        """A report for each subject, in their order.

        Raises:
            IsokernError: a process cannot be started, or does not know a backend.
        """
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                ended, _ = wait([pool.submit(self._work) for _ in range(self._jobs)], return_when=FIRST_EXCEPTION)
            finally:
                self._stop()  # what still runs: after an error, or when interrupted
        for process in self._processes:
            process.close()
        for future in ended:
            future.result()
        return [self._joined(number) for number in range(len(self._subjects))]

    def _parts(self) -> list[_Part]:
        """What there is to do, what takes longest first: one that starts last keeps all others waiting."""
        beside: list[_Part] = []
        main: list[_Part] = []
        skipped: list[_Part] = []
        checks = list(self._checks.values())
        possible = [check for check in checks if self._on_gpu(check)]
        for check in reversed(checks):  # the last ones of the suite are long
            for number, subject in enumerate(self._subjects):
                place = subject.place
                if place.beside is None or check in (possible or checks[:1]):  # it must at least say what it is
                    main.append(_Part(number, check.id, place.engine))
                if place.beside is not None and check not in possible:
                    (beside if self._tried(check) else skipped).append(_Part(number, check.id, place.beside))
        return [*beside, *main, *skipped]

    def _tried(self, check: Check) -> bool:
        return check.tier is Tier.FAST or self._tier is Tier.FULL

    def _on_gpu(self, check: Check) -> bool:
        return self._tried(check) and check.needs in (Needs.ANY, Needs.GPU)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._waiting.clear()
            for process in self._processes:
                process.kill()

    def _work(self) -> None:
        """One thread: parts that its process can run as long as there are any, then others, with another process."""
        before: _Part | None = None
        process: CheckProcess | None = None
        try:
            while (part := self._take(before)) is not None:
                if process is None or before is None or before.engine != part.engine:
                    if process is not None:
                        process.close()
                    process = self._open(part.engine)
                report = self._perform(part, process)
                if report.failures and report.place != "cpu":
                    process.close()  # a kernel that failed may have left its context on the device unusable
                self._ended(part, report)
                before = part
        finally:
            if process is not None:
                process.close()

    def _take(self, before: _Part | None) -> _Part | None:
        with self._lock:
            if not self._waiting:
                return None
            alike = (i for i, part in enumerate(self._waiting) if before is not None and part.engine == before.engine)
            return self._waiting.pop(next(alike, 0))

    def _open(self, engine: EngineInfo | None) -> CheckProcess:
        with self._lock:
            if engine is None and self._spare:
                return self._spare.pop()
            process = self._process() if engine is None else EngineSession(engine.backend)
            self._processes.append(process)
            if self._stopped:
                process.kill()
            return process

    def _perform(self, part: _Part, process: CheckProcess) -> Report:
        subject = self._subjects[part.subject]
        place, only = subject.place, [part.check]

        def note(finding: Finding) -> None:
            self._telling.found(subject.label, finding)

        if isinstance(process, EngineSession):
            return process.run_checks(only, self._tier, subject.config, note)
        assert isinstance(process, DeviceProcess)
        return process.run_checks(self._op, place.backend.name, only, self._tier, subject.config, place.device, note)

    def _ended(self, part: _Part, report: Report) -> None:
        with self._lock:
            if self._stopped:
                return  # killed, not died
            self._reports[part] = report
            self._left[part.subject] -= 1
            finished = not self._left[part.subject]
        label = self._subjects[part.subject].label
        if found := [finding for finding in report.findings if finding.check == part.check]:
            self._telling.ended(label, found)
        if finished:
            self._telling.finished(label)

    def _joined(self, number: int) -> Report:
        """The report of a subject: its place's, then what was found beside it, as one process would put them."""
        place = self._subjects[number].place
        titles = {check.id: check.title for check in self._checks.values()}
        report = Report.of_parts(self._found(number, place.engine))
        report = replace(report, titles=titles, place=report.place or place.device)
        beside = [] if place.beside is None else self._found(number, place.beside)
        return report.joined(Report.of_parts(beside)) if beside else report

    def _found(self, number: int, engine: EngineInfo | None) -> list[Report]:
        """In the order of the checks."""
        parts = (_Part(number, check, engine) for check in self._checks)
        return [self._reports[part] for part in parts if part in self._reports]
