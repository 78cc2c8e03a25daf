"""Tables for the cache commands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .compare import Differences
from .entry import Entry
from .found import Located
from .plan import Plan

__all__ = ["candidates_table", "console", "differences_table", "entries_table", "plan_table", "summary_lines"]


def console() -> Console:
    """A console that, when piped, does not cut hashes and names at 80 columns."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=200)


def percent(fraction: float | None) -> str:
    """``0.123`` as ``"12.3 %"``; a dash for None."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def entries_table(located: Iterable[Located]) -> Table:
    """One row per entry."""
    return _table(
        "",
        ("layer", "op", "key", "environment", "choice", "over runner-up", "over default", "measured"),
        (
            (
                item.layer_name,
                item.entry.op,
                item.entry.key_hash,
                item.entry.environment,
                item.entry.label,
                percent(item.entry.margin_over_runner_up),
                percent(item.entry.margin_over_default),
                f"{item.entry.created:%Y-%m-%d}",
            )
            for item in located
        ),
    )


def summary_lines(item: Located) -> list[str]:
    """What an entry is about, one fact a line."""
    entry = item.entry
    environment = item.environment.to_dict() if item.environment else {}
    product = environment.get("labels", {}).get("product", "unknown product")
    return [
        f"op           {entry.op} (contract {entry.contract_version})",
        f"key          {entry.key_hash}  {' '.join(f'{k}={v}' for k, v in sorted(entry.key.items()))}",
        f"environment  {entry.environment}  {product}",
        f"choice       {entry.label}",
        f"rule         {entry.rule}",
        f"margin       {percent(entry.margin_over_runner_up)} over the runner-up, "
        f"{percent(entry.margin_over_default)} over the default",
        f"measured     {', '.join(f'{k} {v}' for k, v in entry.measured.items())}",
        f"layer        {item.layer_name}  {item.path or 'in memory'}",
    ]


def candidates_table(entry: Entry) -> Table:
    """Every candidate with its outcome, the choice marked."""
    return _table(
        "candidates",
        ("", "candidate", "status", "code", "median us", "samples", "fingerprint", "tags", "reason"),
        (
            (
                "*" if candidate == entry.chosen else "",
                candidate.label,
                candidate.status,
                candidate.code or "",
                "" if candidate.median_us is None else f"{candidate.median_us:.4g}",
                len(candidate.samples_us),
                candidate.fingerprint,
                " ".join(candidate.tags),
                candidate.reason or "",
            )
            for candidate in entry.candidates
        ),
    )


def plan_table(plan: Plan) -> Table:
    """One row per choice; the fields that all keys share are left out of each row and said in the title."""
    keys = [choice.key for choice in plan.choices]
    shared = dict(set.intersection(*(set(key.items()) for key in keys))) if keys else {}
    return _table(
        " ".join(f"{name}={shared[name]}" for name in sorted(shared)),
        ("op", "key", "problem", "choice"),
        (
            (
                choice.op,
                choice.key_hash,
                " ".join(f"{name}={choice.key[name]}" for name in sorted(choice.key) if name not in shared),
                choice.label,
            )
            for choice in plan.choices
        ),
    )


def differences_table(found: Differences, first: str, second: str) -> Table:
    """One row per field that differs."""
    return _table("", ("field", first, second), ((name, *pair) for name, pair in found.items()))
