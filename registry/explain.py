"""Printing a Decision. There is no logic here: only what dispatch stored is shown."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table

from .decision import Accepted, Decision

if TYPE_CHECKING:
    from ..cache.entry import Entry
    from .core import Registry

__all__ = ["candidate_table", "decision_table", "explanation", "render"]


def decision_table(decision: Decision) -> Table:
    """The verdict on every backend as a table; the chosen one is marked."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("backend")
    table.add_column("verdict")
    table.add_column("reason", overflow="fold")
    for outcome in decision.outcomes:
        verdict = outcome.verdict
        mark = "->" if outcome.backend == decision.backend else ""
        if isinstance(verdict, Accepted):
            table.add_row(mark, outcome.backend, "accepted", verdict.note)
        else:
            table.add_row(mark, outcome.backend, f"rejected [{verdict.code.value}]", verdict.reason)
    return table


def candidate_table(entry: Entry) -> Table:
    """What the tuner found for every candidate of a stored choice, fastest first."""
    table = Table(title="tuned candidates", title_justify="left", box=None, pad_edge=False)
    for column in ("", "backend", "config", "status", "median us", "reason"):
        table.add_column(column, justify="right" if column == "median us" else "left", overflow="fold")
    for c in sorted(entry.candidates, key=lambda c: (c.median_us is None, c.median_us or 0.0)):
        chosen = c.backend == entry.backend and dict(c.config) == dict(entry.config)
        config = ",".join(f"{k}={v}" for k, v in sorted(c.config.items())) or "default"
        status = c.status if c.code is None else f"{c.status} [{c.code}]"
        median = "" if c.median_us is None else f"{c.median_us:.1f}"
        table.add_row("->" if chosen else "", c.backend, config, status, median, c.reason or "")
    return table


def explanation(decision: Decision, registry: Registry, problem: Any) -> list[RenderableType]:
    """The decision, then what the store holds: the tuned candidates, or the nearest entry and how its key differs."""
    parts: list[RenderableType] = [render(decision)]
    spec = registry.spec(decision.op)
    key, environment = problem.tuning_key(), registry.environment(problem.device)
    entry = registry.store.peek(decision.op, spec.contract_version, key, environment)
    if entry is not None:
        return [*parts, "", candidate_table(entry)]
    nearest = registry.store.nearest(decision.op, key, environment)
    if nearest is None:
        return [*parts, "", "not tuned: the store has no entry of this op for this environment"]
    parts += ["", "not tuned: the nearest entry differs in"]
    table = Table(box=None, pad_edge=False)
    for column in ("field", "this problem", "nearest entry"):
        table.add_column(column)
    for name, difference in nearest.differences.items():
        table.add_row(name, str(difference[0]), str(difference[1]))
    return [*parts, table]


def render(decision: Decision, width: int = 120) -> str:
    """Plain text: op, choice, rule, notes, the problem, and every backend's verdict."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, markup=False, highlight=False)
    config = ",".join(f"{k}={v}" for k, v in decision.config.items()) or "default"
    console.print(f"{decision.op}: {decision.backend} [{config}]")
    console.print(f"rule: {decision.rule.value} ({decision.detail})")
    for note in decision.notes:
        console.print(f"note: {note}")
    console.print("problem: " + " ".join(f"{k}={v}" for k, v in decision.problem.items()))
    console.print(decision_table(decision))
    return out.getvalue().rstrip()
