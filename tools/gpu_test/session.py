"""One run: tasks handed out, results merged into the report as they come, stages and totals printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .limits import goals, missed
from .report import Report
from .task import STAGES, Budget, Outcome, Result, Task

__all__ = ["EXIT_FAILED", "EXIT_INCOMPLETE", "EXIT_OK", "Plan", "WorkOff", "conduct"]

EXIT_OK, EXIT_FAILED, EXIT_INCOMPLETE = 0, 1, 3
#: Faults printed of one task; the report has them all.
_SHOWN = 3


class WorkOff(Protocol):
    """How tasks are performed; see ``workers.work_off``."""

    def __call__(self, tasks: Sequence[Task], jobs: int, budget: Budget) -> Iterator[tuple[Task, Result]]:
        """Perform them; yield each with its result."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Attributes:
    shared: tasks that may share the GPU, with what compiles for them and for the bench.
    alone: tasks that have it for themselves, one after another.
    """

    shared: Sequence[Task]
    alone: Sequence[Task]


def conduct(
    plan: Plan, jobs: int, budget: Budget, report: Report, work_off: WorkOff, say: Callable[[str], None]
) -> int:
    """Run what the report does not hold yet; returns the exit status."""
    for tasks, at_once in ((_pending(plan.shared, report), jobs), (_pending(plan.alone, report), 1)):
        for task, result in work_off(tasks, at_once, budget):
            report.add(task, result)
            _tell(task, result, say)
    met = goals(report.rows.values())
    report.meta["goals"] = {"checked": len(met), "missed": missed(met)}
    report.save()
    return _conclude(report, budget, say)


def _pending(tasks: Sequence[Task], report: Report) -> list[Task]:
    """Without what passed; compiling ahead was planned for what did not."""
    return [task for task in tasks if task.stage == "compile" or not report.passed(task)]


def _tell(task: Task, result: Result, say: Callable[[str], None]) -> None:
    if task.stage == "compile" and result.outcome is Outcome.PASS:
        return
    detail = result.note or " ".join(f"{status} {count}" for status, count in result.counts.items())
    say(f"{result.outcome.value:8} {task.label} {result.seconds:.1f} s {detail}".rstrip())
    for fault in result.faults[:_SHOWN]:
        say(f"         {fault}")


def _conclude(report: Report, budget: Budget, say: Callable[[str], None]) -> int:
    for stage in (*STAGES, "compile"):
        rows = [row for row in report.rows.values() if row["extra"]["stage"] == stage]
        if rows:
            bad = sum(row["extra"]["status"] == Outcome.FAIL for row in rows)
            say(f"{stage}: {len(rows)} rows, {bad} failed")
    for row in report.failures:
        say(f"FAILED {row['extra']['stage']} {row['implementation']} {row['case']}")
    if report.not_run:
        say(f"NOT RUN for lack of budget ({len(report.not_run)}): {', '.join(report.not_run)}")
    say(f"{budget.spent:.0f} s")
    if report.failures:
        return EXIT_FAILED
    return EXIT_INCOMPLETE if report.not_run else EXIT_OK
