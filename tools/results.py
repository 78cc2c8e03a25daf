"""The measured results that tables and plots are made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "newest"]

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

Row = dict[str, Any]


def newest(what: str, having: Callable[[Row], bool] = lambda row: True, results: Path = RESULTS) -> tuple[Row, Path]:
    """The newest file of a kind with a row such as is asked for: a run may have checked and not timed, or timed alone.

    Raises FileNotFoundError if there is none.
    """
    for file in sorted(results.glob(f"*_{what}.json"), reverse=True):
        result: Row = json.loads(file.read_text())
        if any(having(row) for row in result["rows"]):
            return result, file
    raise FileNotFoundError(f"{results}: no *_{what}.json with such rows")
