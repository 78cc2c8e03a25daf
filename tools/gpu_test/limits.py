"""The bench's summary: a line per cell, and the speeds that are aimed at. Missing one is news, not a failure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .sglang import NAME as SGLANG
from .task import Row

__all__ = ["Goal", "by_case", "goals", "missed"]

#: Of copy bandwidth, at 256 decodes; times CuPy's; microseconds per token of one sequence.
_OF_COPY, _TIMES_CUPY, _PER_TOKEN = 0.92, 1.3, 0.5
_LARGE = "decode N=256 "
_SEQUENCE = re.compile(r"mixed 1x(\d+) H=16 HV=32")


@dataclass(frozen=True, slots=True)
class Goal:
    """One comparison. ``value`` is to be at most ``limit``."""

    what: str
    case: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.case}: {self.what} {self.value:.3g}, aimed at most {self.limit:.3g}"


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Timing rows by case and implementation, in their order."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["graph_us"] is not None:
            cases.setdefault(row["case"], {})[row["implementation"]] = row
    return cases


def goals(rows: Iterable[Row]) -> list[Goal]:
    """Every comparison that the rows allow."""
    found: list[Goal] = []
    for case, line in by_case(rows).items():
        us = {name: float(row["graph_us"]) for name, row in line.items()}
        for name in ("cupy", "triton"):
            if name in us and SGLANG in us:
                found.append(Goal(f"{name} us against SGLang's kernel", case, us[name], us[SGLANG]))
            if name in us and case.startswith(_LARGE):
                floor = float(line[name]["floor_us"])
                found.append(Goal(f"{name} us against {_OF_COPY:.0%} of copy", case, us[name], floor / _OF_COPY))
        if "numba_cuda" in us and "cupy" in us:
            found.append(Goal("numba_cuda us against 1.3 x cupy", case, us["numba_cuda"], _TIMES_CUPY * us["cupy"]))
        if "cupy" in us and (sequence := _SEQUENCE.match(case)):
            found.append(Goal("cupy us per token", case, us["cupy"] / int(sequence[1]), _PER_TOKEN))
    return found


def missed(found: Iterable[Goal]) -> list[dict[str, Any]]:
    """Those not met, for a report."""
    return [
        {"what": g.what, "case": g.case, "value": round(g.value, 3), "limit": round(g.limit, 3)}
        for g in found
        if not g.met
    ]
