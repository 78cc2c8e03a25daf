"""A unit of work, and what came of it. Torch-free: both travel between processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["STAGES", "Budget", "Key", "Outcome", "Result", "Row", "Task"]

#: What may be asked for, in the order of reports.
STAGES = ("suite", "configs", "properties", "sanitizer", "bench")

#: One line of a results file; the columns are those of every file under ``benchmarks/results``.
Row = dict[str, Any]
#: What names a row within a report: stage, implementation, case.
Key = tuple[str, str, str]


class Outcome(StrEnum):
    """How a task ended."""

    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"  # does not apply here; the note says why
    NOT_RUN = "not run"  # the budget was spent


@dataclass(frozen=True, slots=True)
class Task:
    """Work for one process.

    Attributes:
        stage: one of :data:`STAGES`, or ``compile``: kernels onto the disk, ahead of what needs them.
        subject: the backend examined; for the bench, what a cell's rows are about is in ``implementations``.
        case: what of it, in a report's words.
        what: the details its stage needs (a check's id, a CaseSpec, a Cell, ...).
        limit: seconds after which it counts as hung.
        implementations: whose rows it makes; empty: one row, of ``subject``.
    """

    stage: str
    subject: str
    case: str
    what: Any = None
    limit: float = 300.0
    implementations: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[Key, ...]:
        """The rows it will make."""
        return tuple((self.stage, who, self.case) for who in self.implementations or (self.subject,))

    @property
    def label(self) -> str:
        return f"{self.stage} {self.subject} {self.case}"


@dataclass(frozen=True, slots=True)
class Result:
    """What a task found.

    Attributes:
        outcome: see :class:`Outcome`.
        faults: a sentence each.
        counts: of the suite's findings, by status.
        note: why it was skipped, or a remark.
        rows: timing rows of the bench; other stages leave it empty.
        facts: about the machine, for the report's ``meta`` (copy bandwidth).
        seconds: wall time in its process.
    """

    outcome: Outcome
    faults: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    rows: tuple[Row, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, faults: list[str], note: str = "") -> Result:
        """Passed if nothing is wrong."""
        return cls(Outcome.FAIL if faults else Outcome.PASS, tuple(faults), note=note)


class Budget:
    """Seconds that may be spent, from now on; None: as many as it takes."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._seconds = seconds

    @property
    def spent(self) -> float:
        return self._clock() - self._began

    @property
    def left(self) -> float | None:
        """Seconds left, at least 0; None without a limit."""
        return None if self._seconds is None else max(0.0, self._seconds - self.spent)

    @property
    def over(self) -> bool:
        return self.left == 0.0
