"""The generated table of docs/performance/host_cost.md, from the newest results of benchmarks/host_cost.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isokern.tools.results import RESULTS, newest


def host_cost(results: Path = RESULTS) -> str:
    """Backend, implementation x case: host microseconds; whole calls first, then their parts."""
    try:
        result, _ = newest("host_cost", results=results)
    except FileNotFoundError:
        return "Not measured yet.\n"
    whole = [row for row in result["rows"] if not row["extra"]["part"]]
    parts = [row for row in result["rows"] if row["extra"]["part"]]
    return _table("whole calls", whole) + "\n" + _table("parts", parts) + _source(result["meta"])


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = list(dict.fromkeys((row["backend"] or "", row["implementation"]) for row in rows))
    cell = {(row["backend"] or "", row["implementation"], row["case"]): row["eager_us"] for row in rows}
    table = [[f"{title}, host us", "backend", *(case.removesuffix(" float32") for case in cases)]]
    table.append(["---"] * len(table[0]))
    for backend, implementation in lines:
        found = (cell.get((backend, implementation, case)) for case in cases)
        table.append(
            [implementation, f"`{backend}`" if backend else "", *("" if x is None else f"{x:.1f}" for x in found)]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def _source(meta: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return f"\nMeasured {meta['date']} on {meta['gpu'] or 'no GPU'}, {meta['cpu']}; {versions}; `{meta['command']}`.\n"
