"""The table of the comparison with other libraries, from the newest results of benchmarks/peers.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isokern.tools.results import RESULTS, newest

__all__ = ["SHORT_N", "Line", "lines_of", "newest_comparison", "peers", "peers_summary", "render", "table_of"]

#: The registry's own choice, and isokern's own backends; every other implementation is a peer.
CHOICE = "isokern"
_GROUPS = {
    "decode": "decode",
    "short": "short and verification",
    "mixed": "mixed",
    "prefill": "prefill",
    "report": "others",
    "prompts": "other prompts",
}
_NONE = "Not measured yet.\n"
#: Host time matters most where the device's is short: up to so many sequences of one token.
SHORT_N = 16


@dataclass(frozen=True, slots=True)
class Line:
    """One cell: its rows by implementation, and the names of those that are peers."""

    case: str
    group: str
    rows: dict[str, dict[str, Any]]
    peers: tuple[str, ...]

    def best_peer(self, column: str = "graph_us") -> str | None:
        timed = [name for name in self.peers if self.us(name, column) is not None]
        return min(timed, key=lambda name: self.rows[name][column], default=None)

    def us(self, name: str, column: str = "graph_us") -> float | None:
        row = self.rows.get(name)
        return None if row is None or row[column] is None else float(row[column])

    @property
    def floor(self) -> float | None:
        return next((row["floor_us"] for row in self.rows.values() if row["floor_us"] is not None), None)

    def ratio(self, column: str = "graph_us") -> float | None:
        """Best peer over isokern's choice."""
        best, own = self.best_peer(column), self.us(CHOICE, column)
        return None if best is None or own is None else self.rows[best][column] / own


def lines_of(result: dict[str, Any]) -> list[Line]:
    """A line per cell, in the file's order. ``meta.peers`` names the peers."""
    peers = tuple(result["meta"].get("peers", ()))
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["extra"].get("group") == "gate":
            continue
        cells.setdefault(row["case"], {})[row["implementation"]] = row
    made = []
    for case, rows in cells.items():
        group = next(iter(rows.values()))["extra"].get("group", "report")
        made.append(Line(case, group, rows, tuple(name for name in peers if name in rows)))
    return made


def render(result: dict[str, Any]) -> str:
    """Markdown: us in a CUDA graph / eager per cell and implementation, then geometric means per group."""
    lines = lines_of(result)
    present = list(dict.fromkeys(name for line in lines for name in line.rows if _timed(line, name)))
    peers = [name for name in result["meta"].get("peers", ()) if name in present]
    own = [CHOICE] * (CHOICE in present) + [name for name in present if name not in (CHOICE, *peers)]
    table = [["case", "floor", *(f"`{name}`" for name in (*own, *peers)), "best peer", "best peer / isokern"]]
    for line in lines:
        cells = [_cell(line, name) for name in (*own, *peers)]
        best = line.best_peer()
        table.append([line.case, _number(line.floor), *cells, best or "", _number(line.ratio(), 2)])
    return table_of(table) + "\n" + _summary(lines) + _gates(result["rows"])


def _gates(rows: Sequence[dict[str, Any]]) -> str:
    """Implementation x batch: whether its first configs conform with the contract, slots of -1 and empty sequences."""
    gated = [row for row in rows if row["extra"].get("group") == "gate"]
    if not gated:
        return ""
    cases = list(dict.fromkeys(row["case"] for row in gated))
    status = {(row["implementation"], row["case"]): row["extra"]["status"] for row in gated}
    names = dict.fromkeys(row["implementation"] for row in gated)
    table = [["conformance", *(case.removeprefix("gate ") for case in cases)]]
    table += [[f"`{name}`", *(status.get((name, case), "") for case in cases)] for name in names]
    return "\n" + table_of(table)


def _timed(line: Line, name: str) -> bool:
    return line.us(name, "graph_us") is not None or line.us(name, "eager_us") is not None


def _cell(line: Line, name: str) -> str:
    graph, eager = line.us(name), line.us(name, "eager_us")
    if graph is None and eager is None:
        status = line.rows[name]["extra"].get("status", "") if name in line.rows else ""
        return status if status in ("wrong", "crashed", "timeout", "failed") else ""
    return f"{_number(graph) or '-'} / {_number(eager, 0) or '-'}"


def _summary(lines: Sequence[Line]) -> str:
    table = [["best peer / isokern", "cells", "geometric mean", "least", "where"]]
    for group, title in _GROUPS.items():
        of_group = [line for line in lines if line.group == group]
        table += _means(f"{title}, CUDA graph", of_group, "graph_us")
    host = [x for x in lines if x.group == "short" or (x.group == "decode" and _batch(x.case) <= SHORT_N)]
    table += _means(f"decode N <= {SHORT_N} and short, eager", host, "eager_us")
    if len(table) > 1:
        return table_of(table)
    chosen = any(CHOICE in line.rows for line in lines)
    return "No cell has both isokern's and a peer's time yet.\n" if chosen or not lines else ""


def _batch(case: str) -> int:
    return int(case.partition("N=")[2].split()[0]) if "N=" in case else 0


def _means(title: str, lines: Iterable[Line], column: str) -> list[list[str]]:
    ratios = {line.case: ratio for line in lines if (ratio := line.ratio(column)) is not None}
    if not ratios:
        return []
    mean = math.exp(sum(math.log(r) for r in ratios.values()) / len(ratios))
    least = min(ratios, key=lambda case: ratios[case])
    return [[title, str(len(ratios)), f"{mean:.2f}", f"{ratios[least]:.2f}", least]]


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table_of(table: list[list[str]]) -> str:
    """Markdown; the first row is the header."""
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def peers(results: Path = RESULTS, groups: Sequence[str] | None = None) -> str:
    """The newest results file of benchmarks/peers.py, whose cells have a group; a sentence where there is none.

    Args:
        groups: of cells, as in ``benchmarks/peers_cells.py``; None: all.
    """
    result = newest_comparison(results)
    if result is None:
        return _NONE
    if groups is not None:
        result = result | {"rows": [row for row in result["rows"] if row["extra"].get("group") in groups]}
    meta = result["meta"]
    return render(result) + f"\nMeasured {_where(meta)}; `{meta['command']}`.\n"


def peers_summary(results: Path = RESULTS) -> str:
    """Of the same file: each group's geometric mean and its worst cell."""
    result = newest_comparison(results)
    return _NONE if result is None else _summary(lines_of(result)) + f"\nMeasured {_where(result['meta'])}.\n"


def newest_comparison(results: Path = RESULTS) -> dict[str, Any] | None:
    """The newest results file of benchmarks/peers.py whose cells have a group; None where there is none."""
    try:
        return newest("peers", lambda row: "group" in row["extra"], results)[0]
    except FileNotFoundError:
        return None


def _where(meta: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
    return f"{meta['date']} on {meta['gpu']}; {versions}"
