"""From a finished contest to the store's entry: the choice, and every candidate with samples, status and reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any, Literal

from .. import __version__
from ..cache.candidate import CandidateRecord
from ..cache.entry import Entry, Measured
from ..registry.decision import Rejected
from .candidates import Admission, Candidate
from .contest import Standing
from .resume import Verdict
from .select import Selection

__all__ = ["Findings", "make_entry", "typical_seconds"]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that is known about one problem's candidates.

    Attributes:
        admission: who was asked. verdicts: the gate's, by candidate name. standing: the contest's end.
        carried: records of an earlier entry that still hold, by candidate name; these did not race again.
        selection: the choice.
    """

    admission: Admission
    verdicts: Mapping[str, Verdict]
    standing: Standing
    carried: Mapping[str, CandidateRecord]
    selection: Selection


def make_entry(
    findings: Findings,
    op: str,
    contract_version: int,
    key: Mapping[str, Any],
    environment: str,
    mode: Literal["eager", "graph"],
    seconds: float,
) -> Entry:
    """The entry to store.

    Args:
        key: the problem's tuning key. environment: hash of the environment. seconds: wall time spent on it.
    """
    selection = findings.selection
    chosen = next(c for c in findings.admission.candidates if c.name == selection.winner)
    records = [_record(findings, c) for c in findings.admission.candidates]
    return Entry(
        op=op,
        contract_version=contract_version,
        key=dict(key),
        backend=chosen.backend,
        config=dict(chosen.config.to_dict()),
        margin_over_runner_up=_speedup(selection.over_runner_up),
        margin_over_default=_speedup(selection.over_default),
        rule=selection.text,
        candidates=(*records, *findings.admission.declined),
        measured=Measured(
            policy=mode,
            method=findings.standing.method,
            launches=findings.standing.launches,
            seconds=round(seconds, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            isokern=__version__,
        ),
        environment=environment,
    )


def _speedup(margin: Any) -> float | None:
    return None if margin is None else margin.speedup


def _record(findings: Findings, candidate: Candidate) -> CandidateRecord:
    carried = findings.carried.get(candidate.name)
    if carried is not None:
        return carried
    verdict = findings.verdicts[candidate.name]
    winner = findings.selection.winner
    seconds = _samples(findings.standing, candidate.name)
    rejected = None if candidate.name == winner else _rejection(findings, candidate.name)
    typical = typical_seconds(findings.standing, candidate.name, winner) if seconds else verdict.first_s
    return CandidateRecord(
        backend=candidate.backend,
        config=dict(candidate.config.to_dict()),
        status="ok" if rejected is None else "rejected",
        code=None if rejected is None else rejected.code.value,
        reason=None if rejected is None else rejected.reason,
        median_us=None if typical is None else _us(typical),
        samples_us=tuple(_us(s) for s in seconds),
        fingerprint=candidate.fingerprint,
        tags=verdict.tags,
        source=candidate.source,
    )


def _rejection(findings: Findings, name: str) -> Rejected | None:
    standing = findings.standing
    sources: Sequence[Mapping[str, Rejected]] = (
        {name: v.rejected for name, v in findings.verdicts.items() if v.rejected is not None},
        standing.failed,
        standing.screened.dropped if standing.screened else {},
        standing.raced.eliminated if standing.raced else {},
    )
    return next((source[name] for source in sources if name in source), None)


def _samples(standing: Standing, name: str) -> tuple[float, ...]:
    """The race's samples, or the screen's where it did not race; seconds."""
    raced = standing.raced.table.seconds(name) if standing.raced else ()
    if raced or standing.screened is None:
        return raced
    return standing.screened.samples.get(name, ())


def typical_seconds(standing: Standing, name: str, winner: str) -> float:
    """Median seconds of ``name``, which has samples; of any but the winner, the winner's times what it took beside it.

    A host's speed changes by half within seconds, so medians of different blocks do not compare; ratios within
    blocks do.
    """
    mine = _samples(standing, name)
    beside = _beside(standing, name, winner)
    if not beside:
        return median(mine)
    return median(_samples(standing, winner)) * math.exp(median(math.log(a / b) for a, b in beside))


def _beside(standing: Standing, name: str, winner: str) -> list[tuple[float, float]]:
    """The times of both in every block that has both: of the race, or pass by pass of the screen where one did not."""
    if standing.raced is not None and (logs := standing.raced.table.differences(name, winner)).size:
        return [(math.exp(log), 1.0) for log in logs]
    screened = {} if standing.screened is None else standing.screened.samples
    return list(zip(screened.get(name, ()), screened.get(winner, ()), strict=False))


def _us(seconds: float) -> float:
    return float(f"{seconds * 1e6:.6g}")  # more digits are noise, and the file is read by people
