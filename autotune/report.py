"""Plans and reports as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from ..registry.accuracy import DEFAULT, policy_of
from .samples import format_seconds
from .warmup import PlannedProblem, ProblemReport, WarmupPlan, WarmupReport
from .worth import makespan, units

__all__ = ["format_duration", "plan_summary", "plan_table", "report_summary", "report_table"]


def format_duration(seconds: float) -> str:
    """``"48 s"``, ``"5 min 30 s"``: for people who wait."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plan_table(plan: WarmupPlan) -> Table:
    """One row per problem: what is known, how many candidates there are, how long it will take."""
    table = Table(title=f"{plan.title}, on {plan.device}", title_justify="left", box=None, pad_edge=False)
    table.add_column("case", overflow="fold")
    table.add_column("profile")
    table.add_column("candidates", justify="right")
    table.add_column("state")
    table.add_column("estimate", justify="right")
    for problem in plan.problems:
        state = Text(f"known: {problem.entry.label}", "green") if problem.entry else Text("to tune", "yellow")
        estimate = "" if problem.known else format_duration(problem.estimate_s)
        profile = problem.task.problem.profile.label
        table.add_row(_cases(problem), profile, str(problem.candidates), state, estimate)
    return table


def plan_summary(plan: WarmupPlan, tuners: int = 1) -> str:
    """One line: how much is to do, how long that takes ``tuners`` devices, and where the results go."""
    todo = sum(not p.known for p in plan.problems)
    where = plan.store_path or "memory only: no layer of the store is writable"
    if not todo:
        return f"all {len(plan.problems)} problems are known; store: {where}"
    on = f" on {tuners} devices" if tuners > 1 else ""
    estimate = f"about {format_duration(_estimate(plan, tuners))}{on} (from {plan.estimate})"
    return f"{todo} of {len(plan.problems)} problems to tune, {estimate}; store: {where}"


def report_table(report: WarmupReport) -> Table:
    """One row per problem: the winner, its time, and by how much it won."""
    plan = report.plan
    table = Table(title=f"{plan.title}, on {plan.device}", title_justify="left", box=None, pad_edge=False)
    table.add_column("case", overflow="fold")
    table.add_column("winner", overflow="fold")
    table.add_column("median", justify="right")
    table.add_column("over runner-up", justify="right")
    table.add_column("over default", justify="right")
    table.add_column("rejected", overflow="fold")
    table.add_column("took", justify="right")
    for problem in report.problems:
        table.add_row(*_row(problem))
    for skipped in report.skipped:
        table.add_row(_cases(skipped), Text("not reached: budget spent", "yellow"), "", "", "", "", "")
    return table


def _row(problem: ProblemReport) -> tuple[str | Text, ...]:
    entry = problem.entry
    name = _cases(problem.planned)
    took = "known" if problem.was_known else format_duration(problem.seconds)
    if entry is None:
        return name, Text(problem.error.partition("\n")[0], "red"), "", "", "", "", took
    winner = Text(entry.label)
    if problem.proof is not None and not problem.proof.ok:
        winner.append(f" NOT PROVEN: {problem.proof.error}", "red")
    median = entry.chosen.median_us
    return (
        name,
        winner,
        "" if median is None else format_seconds(median * 1e-6),
        _margin(entry.margin_over_runner_up),
        _margin(entry.margin_over_default) if entry.margin_over_default is not None else "is default",
        _counts(problem.rejected),
        took,
    )


def report_summary(report: WarmupReport, tuners: int = 1) -> str:
    """One line: what was done, in what time against the estimate, and where the results are."""
    known = sum(p.was_known for p in report.problems)
    tuned = sum(p.entry is not None and not p.was_known for p in report.problems)
    proven = sum(p.proof is not None and p.proof.ok for p in report.problems)
    parts = [f"{tuned} tuned", f"{known} known", f"{proven} proven in a fresh process"]
    if report.errors:
        parts.append(f"{len(report.errors)} failed")
    if report.skipped:
        parts.append(f"{len(report.skipped)} not reached")
    codes: Counter[str] = Counter()
    for problem in report.problems:
        if not problem.was_known:
            codes += problem.rejected
    if codes:
        parts.append(f"rejected: {_counts(codes)}")
    where = report.plan.store_path or "memory only"
    return f"{', '.join(parts)}; {format_duration(report.seconds)}{_against(report, tuners)}; store: {where}"


def _estimate(plan: WarmupPlan, tuners: int) -> float:
    """Seconds; several tuners each have their problems' kernels compiled before they begin."""
    if tuners == 1 or plan.estimate_s == 0:
        return plan.estimate_s
    return plan.start_s + plan.compile_s + makespan(units(plan.problems), tuners)


def _against(report: WarmupReport, tuners: int) -> str:
    """How the time compares with what the plan had said; nothing if there was nothing to estimate."""
    estimate = _estimate(report.plan, tuners)
    if not estimate or report.skipped or not report.seconds:
        return ""
    return f", {report.seconds / estimate:.1f}x the estimate"


def _cases(planned: PlannedProblem) -> str:
    first, *others = planned.cases
    named = first if not others else f"{first} (and {', '.join(others)})"
    under = policy_of(planned.task.problem)
    return named if under == DEFAULT else f"{named}, accuracy {under}"


def _margin(value: float | None) -> str:
    """As a percentage; as a factor from 2x on."""
    if value is None:
        return "-"
    return f"{1 + value:.1f}x" if value >= 1 else f"{100 * value:+.1f} %"


def _counts(codes: Iterable[str] | Counter[str]) -> str:
    return ", ".join(f"{n} {code}" for code, n in Counter(codes).most_common())
