"""The table of hardware counters, from ``meta.counters`` of the newest comparison: what benchmarks/counters.py read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isokern.tools.peers_table import newest_comparison, table_of
from isokern.tools.results import RESULTS

__all__ = ["counters"]

_NONE = "Not measured yet.\n"
#: How many stall reasons are shown.
_STALLS = 2
_PERCENT = {"memory %": "dram_pct", "issue %": "issue_pct", "tensor %": "tensor_pct", "warps %": "warps_pct"}


def counters(results: Path = RESULTS, groups: Sequence[str] | None = None) -> str:
    """A row per kernel of a call: time, shares of the peaks of memory, issue and tensor cores, why warps waited.

    Args:
        groups: of cells, as in ``benchmarks/peers_cells.py``; None: all.

    Returns:
        Markdown, with how it was measured; a sentence where the newest comparison has no counters of these groups.
    """
    result = newest_comparison(results)
    meta = {} if result is None else result["meta"]
    rows = [row for row in meta.get("counters", ()) if groups is None or row["group"] in groups]
    if result is None or not rows:
        return _NONE
    place = {case: i for i, case in enumerate(dict.fromkeys(row["case"] for row in result["rows"]))}
    # Sorting keeps the kernels of a call in their order.
    rows.sort(key=lambda row: (place.get(row["case"], len(place)), row["case"], row["implementation"] != "isokern"))
    header = ["case", "implementation", "kernel", "us", *_PERCENT, "waves", "warps wait for"]
    return table_of([header, *map(_line, rows)]) + "".join(f"\n{_source(made)}" for made in meta["counters_made"])


def _line(row: Mapping[str, Any]) -> list[str]:
    shares = sorted(row["stalls"].items(), key=lambda item: -item[1])[:_STALLS]
    return [
        row["case"],
        f"`{row['implementation']}`",
        f"`{row['kernel']}`",
        _number(row["us"], 1 if row["us"] is not None and row["us"] >= 10 else 2),
        *(_number(row[column], 0) for column in _PERCENT.values()),
        _number(row["waves"], 2),
        ", ".join(f"{reason.replace('_', ' ')} {100 * share:.0f} %" for reason, share in shares),
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _source(made: Mapping[str, Any]) -> str:
    return f"Counters of {made['date']} on {made['gpu']}, Nsight Compute {made['ncu']}; `{made['command']}`.\n"
