"""The generated table of docs/performance/recurrent.md, from the newest GPU results file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from isokern.tools.results import RESULTS, newest

#: Whose columns come first; others follow by name. The peer's kernel is the last.
FIRST = ("cupy", "triton", "numba_cuda")
PEER = "sgl_triton"


def recurrent(results: Path = RESULTS) -> str:
    """Microseconds of every cell, and under them what was checked on the same GPU."""
    timed, _ = newest("gpu_suite", lambda row: row["graph_us"] is not None, results)
    checked, _ = newest("gpu_suite", _is_check, results)
    timings = _timings(timed["rows"]) + _source("Measured", timed["meta"])
    return timings + _checks(checked["rows"]) + _source("Checked", checked["meta"])


def _is_check(row: dict[str, Any]) -> bool:
    return row["extra"].get("stage") not in (None, "bench", "compile")


def _timings(rows: list[dict[str, Any]]) -> str:
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["graph_us"] is not None:
            cases.setdefault(row["case"], {})[row["implementation"]] = row
    present = {name for line in cases.values() for name in line}
    names = [n for n in FIRST if n in present] + sorted(present - {*FIRST, PEER}) + [PEER] * (PEER in present)
    lines = []
    for case, line in cases.items():
        own = {name: row["graph_us"] for name, row in line.items() if name != PEER}
        best = min(own.values(), default=None)
        floor = next(iter(line.values()))["floor_us"]
        cells = [f"{line[n]['graph_us']:.1f} / {line[n]['eager_us']:.0f}" if n in line else "" for n in names]
        lines.append([case, f"{floor:.1f}", *cells, "" if best is None else f"{best / floor:.2f}"])
    return _markdown(["us, graph / eager", "floor", *(f"`{n}`" for n in names), "best / floor"], lines)


def _source(done: str, meta: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    copy = meta.get("copy_TB_s")
    copied = f"; copy {copy} TB/s" if isinstance(copy, float) else ""
    return f"\n{done} {meta['date']} on {meta['gpu']}{copied}; {versions}; `{meta['command']}`.\n"


def _checks(rows: list[dict[str, Any]]) -> str:
    """Stage x backend: how many checks, and how they ended."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        extra = row["extra"]
        if _is_check(row):
            counts.setdefault((extra["stage"], row["implementation"]), Counter())[extra["status"]] += 1
    if not counts:
        return ""
    stages = list(dict.fromkeys(stage for stage, _ in counts))
    names = list(dict.fromkeys(name for _, name in counts))
    lines = [
        [stage, *(", ".join(f"{s} {n}" for s, n in sorted(counts.get((stage, name), {}).items())) for name in names)]
        for stage in stages
    ]
    return "\n" + _markdown(["checks", *(f"`{n}`" for n in names)], lines)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(recurrent())
