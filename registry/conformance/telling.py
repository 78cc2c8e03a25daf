"""What a run of the suite says while it goes on: moving text on a terminal, elsewhere a line for each check."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Protocol

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .check import Finding, Status
from .report import Summary

__all__ = ["Lines", "Moving", "Telling", "telling_on"]

#: Cases of a check that are quoted at once; the report has them all.
_SHOWN = 3


class Telling(Protocol):
    """Called from any thread. ``subject``: a backend, and its config if it is not the default."""

    def found(self, subject: str, finding: Finding) -> None:
        """A case was examined."""

    def ended(self, subject: str, findings: Sequence[Finding]) -> None:
        """A check has ended, with these findings, at least one."""

    def finished(self, subject: str) -> None:
        """All its checks have."""


class Lines:
    """A line per check, and the first cases that speak against the backend: a run cut off has shown what it found."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._lock = Lock()

    def found(self, subject: str, finding: Finding) -> None:
        """Nothing yet."""

    def ended(self, subject: str, findings: Sequence[Finding]) -> None:
        check = findings[0].check
        summary = Summary.of(check, findings)
        lines = [f"{subject}: {check}: {summary.label}, {summary.seconds:.1f} s"]
        bad = [f for f in findings if f.status in (Status.FAIL, Status.ERROR)]
        lines += [f"    [{f.case}] {f.status}: {f.message}" for f in bad[:_SHOWN]]
        if len(bad) > _SHOWN:
            lines.append(f"    ... and {len(bad) - _SHOWN} more")
        with self._lock:
            self._out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)

    def finished(self, subject: str) -> None:
        """The table follows."""


class Moving:
    """A spinner per subject, with the check it is at and the cases examined."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._lock = Lock()

    def found(self, subject: str, finding: Finding) -> None:
        with self._lock:
            if subject not in self._tasks:
                self._tasks[subject] = self._progress.add_task(subject, total=None)
            self._progress.update(self._tasks[subject], advance=1, description=f"{subject} {finding.check}")

    def ended(self, subject: str, findings: Sequence[Finding]) -> None:
        """The next finding says so."""

    def finished(self, subject: str) -> None:
        with self._lock:
            if subject in self._tasks:
                self._progress.remove_task(self._tasks.pop(subject))


def telling_on(out: Console) -> tuple[AbstractContextManager[object], Telling]:
    """What suits ``out``, and what it is to be used within."""
    if not out.is_terminal:
        return nullcontext(), Lines(out)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=out, transient=True)
    return progress, Moving(progress)
