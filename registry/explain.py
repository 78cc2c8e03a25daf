"""Printing a Decision. There is no logic here: only what dispatch stored is shown."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from .decision import Accepted, Decision

__all__ = ["decision_table", "render"]


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
