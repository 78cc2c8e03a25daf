"""The report: rows merged into one results file as they come, so that a killed run loses nothing.

The file has the schema of every file under ``benchmarks/results``: ``meta`` and ``rows``. A row is a check (its
``extra`` says stage, status, faults and seconds) or a timing; what neither failed nor changed since is not run again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .task import Key, Outcome, Result, Row, Task

__all__ = ["Report", "timing_row"]

#: (stage, implementation) to the fingerprint of what its rows depend on.
Fingerprint = Callable[[str, str], str]


def timing_row(
    case: str,
    implementation: str,
    *,
    backend: str | None = None,
    config: str | None = None,
    graph_us: float | None = None,
    eager_us: float | None = None,
    floor_us: float | None = None,
    error: float | None = None,
    **extra: Any,
) -> Row:
    """A row with every column of the schema; times in microseconds, ``error`` a relative 2-norm."""
    return {
        "case": case,
        "implementation": implementation,
        "backend": backend,
        "config": config,
        "graph_us": graph_us,
        "eager_us": eager_us,
        "floor_us": floor_us,
        "error": error,
        "extra": extra,
    }


class Report:
    """Rows by (stage, implementation, case), kept equal to a file.

    Attributes:
        meta: machine, versions, command, and what the run adds.
        rows: in the order they were first made.
        not_run: what the budget did not suffice for.
    """

    def __init__(self, path: Path | None, meta: dict[str, Any], fingerprint: Fingerprint) -> None:
        self.path = path
        self.meta = meta
        self.rows: dict[Key, Row] = {}
        self.not_run: list[str] = []
        self._fingerprint = fingerprint
        self._seconds: dict[str, float] = {}

    def resume(self) -> int:
        """Take over the rows of an existing file whose sources are those of today; returns how many were not.

        Raises ValueError if the file is not such a report.
        """
        if self.path is None or not self.path.exists():
            return 0
        old = json.loads(self.path.read_text())
        if not isinstance(old, dict) or not isinstance(old.get("rows"), list):
            raise ValueError(f"{self.path} is no results file")
        for row in old["rows"]:
            extra = row["extra"]
            key = (extra.get("stage", ""), row["implementation"], row["case"])
            if extra.get("fingerprint") is not None and extra["fingerprint"] == self._fingerprint(*key[:2]):
                self.rows[key] = row
        self.meta.update({name: old["meta"][name] for name in ("copy_TB_s",) if name in old.get("meta", {})})
        return len(old["rows"]) - len(self.rows)

    def passed(self, task: Task) -> bool:
        """Whether every row the task would make is there and good."""
        good = (Outcome.PASS, Outcome.SKIPPED)
        return bool(task.keys) and all(
            key in self.rows and self.rows[key]["extra"]["status"] in good for key in task.keys
        )

    def add(self, task: Task, result: Result) -> None:
        """Merge what a task found and write the file."""
        self._seconds[task.stage] = self._seconds.get(task.stage, 0.0) + result.seconds
        self.meta.update(result.facts)
        if result.outcome is Outcome.NOT_RUN:
            self.not_run.append(task.label)
        elif task.stage == "compile" and result.outcome is Outcome.PASS:
            return  # hundreds of them, and none makes a row
        else:
            made = {row["implementation"]: row for row in result.rows}
            for key in task.keys:
                row = made.get(key[1]) or timing_row(key[2], key[1], backend=key[1])
                row["extra"] = self._extra(key, result, row["extra"])
                self.rows[key] = row
        self.save()

    def _extra(self, key: Key, result: Result, more: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = {
            "stage": key[0],
            "status": result.outcome.value,
            "faults": list(result.faults),
            "seconds": round(result.seconds, 2),
            "fingerprint": self._fingerprint(key[0], key[1]),
        }
        if result.counts:
            own["counts"] = dict(result.counts)
        if result.note:
            own["note"] = result.note
        return own | more  # a row of a cell says itself whether it passed

    @property
    def failures(self) -> list[Row]:
        """Rows that failed, taken-over ones included."""
        return [row for row in self.rows.values() if row["extra"]["status"] == Outcome.FAIL]

    def save(self) -> None:
        """Write the file: all of it or nothing."""
        if self.path is None:
            return
        meta = self.meta | {
            "seconds": {stage: round(spent, 1) for stage, spent in self._seconds.items()},
            "failed": [_title(row) for row in self.failures],
            "not_run": self.not_run,
        }
        text = json.dumps({"meta": meta, "rows": list(self.rows.values())}, indent=1) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(self.path)


def _title(row: Row) -> str:
    return f"{row['extra']['stage']} {row['implementation']} {row['case']}"
