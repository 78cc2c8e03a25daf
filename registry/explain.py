"""Printing a Decision, and the store's record behind it. There is no logic here: only what was stored is shown."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table

from .decision import Accepted, Decision, Rule
from .stored import shipped_entries

if TYPE_CHECKING:
    from ..cache.entry import Entry
    from ..cache.environment import Environment
    from .core import Registry

__all__ = ["candidate_table", "decision_table", "explanation", "render", "tuning_lines"]


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
    """What the tuner found for every candidate of a stored choice, fastest first, those never timed last."""
    table = Table(title="tuned candidates", title_justify="left", box=None, pad_edge=False)
    right = ("median us", "to winner", "samples")
    for column in ("", "backend", "config", "status", *right, "reason"):
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    best = entry.chosen.median_us
    for c in sorted(entry.candidates, key=lambda c: (c.median_us is None, c.median_us or 0.0)):
        chosen = c.backend == entry.backend and dict(c.config) == dict(entry.config)
        config = ",".join(f"{k}={v}" for k, v in sorted(c.config.items())) or "default"
        status = c.status if c.code is None else f"{c.status} [{c.code}]"
        median = "" if c.median_us is None else f"{c.median_us:.4g}"
        ratio = "" if c.median_us is None or not best else f"{c.median_us / best:.2f}x"
        samples = str(len(c.samples_us) or "")
        table.add_row("->" if chosen else "", c.backend, config, status, median, ratio, samples, c.reason or "")
    return table


def tuning_lines(entry: Entry, current: Mapping[str, str]) -> list[str]:
    """Why a stored choice won, by how much, when and how it was measured, and what has changed since.

    Args: current: fingerprint of each registered backend.
    """
    measured = entry.measured
    lines = [
        f"tuned choice: {entry.label}: {entry.rule}",
        f"margin: {_margin(entry.margin_over_runner_up)} over the runner-up, "
        f"{_margin(entry.margin_over_default)} over the default",
        f"measured: {measured['created']}, {measured['method']}, {measured['launches']} launches",
    ]
    changed = [name for name in entry.stale_backends(current) if name != entry.backend]
    if current.get(entry.backend) != entry.chosen.fingerprint:
        lines.append(f"does not count: {entry.backend!r} has changed since, or is not registered")
    if changed:
        lines.append(f"changed since, so a new race could end differently: {', '.join(changed)}")
    return lines


def _margin(fraction: float | None) -> str:
    return "nothing to compare with" if fraction is None else f"{100 * fraction:+.1f} %"


def explanation(decision: Decision, registry: Registry, problem: Any) -> list[RenderableType]:
    """The decision, then what the store holds: the tuned candidates, or the nearest entry and how its key differs."""
    parts: list[RenderableType] = [render(decision)]
    from ..cache.found import Hit

    spec = registry.spec(decision.op)
    key, environment = problem.tuning_key(), registry.environment(problem.device)
    prints = registry.fingerprints(decision.op)
    if decision.rule in (Rule.TUNED_SHIPPED, Rule.OTHER_SILICON):
        shipped = shipped_entries(registry, spec, problem, same=decision.rule is Rule.TUNED_SHIPPED)
        for name, made in shipped:
            if decision.detail.startswith(name):  # nearer ones may have had nothing that runs here
                return [*parts, "", f"{name}:", *tuning_lines(made, prints), candidate_table(made)]
    # What counts, whichever layer it is in; else what there would be, and why it does not.
    tuned = registry.store.get(decision.op, spec.contract_version, key, environment, prints)
    if isinstance(tuned, Hit):
        entry: Entry | None = tuned.entry
    else:
        entry = registry.store.peek(decision.op, spec.contract_version, key, environment)
    if entry is not None:
        return [*parts, "", *tuning_lines(entry, prints), candidate_table(entry)]
    nearest = registry.store.nearest(decision.op, key, environment)
    if nearest is None:
        return [
            *parts,
            "",
            "not tuned: the store has no entry of this op for this environment",
            *_elsewhere(registry, decision, environment),
        ]
    found = nearest.located.entry
    parts += ["", f"not tuned: the nearest entry, {found.key_hash} with {found.label}, differs in"]
    table = Table(box=None, pad_edge=False)
    for column in ("field", "this problem", "nearest entry"):
        table.add_column(column)
    for name, difference in nearest.differences.items():
        table.add_row(name, str(difference[0]), str(difference[1]))
    return [*parts, table]


def _elsewhere(registry: Registry, decision: Decision, environment: Environment) -> list[str]:
    """Entries of other environments: the usual reason for having none here is an upgrade."""
    others = {
        e.environment.hash: e.environment
        for e in registry.store.entries()
        if e.environment and e.entry.op == decision.op
    }
    lines = []
    for other in others.values():
        fields = ", ".join(
            f"{name}: {theirs!r} there, {mine!r} here" for name, (mine, theirs) in environment.diff(other).items()
        )
        lines.append(f"tuned for {other.describe()} [{other.hash}], which differs in {fields}")
    return lines


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
