"""What of an entry travels: the choice, what came near it, the best of each backend, and why not the rest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from .candidate import CandidateRecord
from .entry import Entry

__all__ = ["MAX_SAMPLES", "NEAR", "REASON_CHARACTERS", "extract", "without_strangers"]

#: How much slower than the choice a candidate may be, as a fraction of its time, to be kept with its samples: another
#: driver or compiler moves kernels by some percent, and which of them is best there is to be seen.
NEAR = 0.25
#: Of a reason: enough to see what was wrong, and no tracebacks.
REASON_CHARACTERS = 120
#: Kept of each candidate, the first of the race: twice what it takes for a verdict.
MAX_SAMPLES = 64
#: Says what was on the machine that measured, and nothing about the problem.
_LOCAL = "not_installed"
#: An absolute path: where files lie on one machine is nobody else's business. Its last part may say something.
_PATH = re.compile(r"(?<![\w./])(?:[A-Za-z]:\\|/)(?:[^\s/\\:'\"(),]+[/\\])+([^\s/\\:'\"(),]*)")


def extract(entry: Entry) -> Entry:
    """``entry``, shortened.

    The choice, whatever is at most :data:`NEAR` slower and the fastest of each backend keep their samples; what else
    was slower keeps its time, which says why, and one sample if it raced. Whatever was rejected for anything else keeps
    its reason, in at most :data:`REASON_CHARACTERS` and without paths of the machine. Backends that were not installed
    are left out.
    """
    current = [c for c in entry.candidates if c.code != _LOCAL]
    best = _best_of_each(current, raced_only=True)
    limit = _limit(entry)
    rows = []
    for record in current:
        slower = record.slower
        comparable = record.right and (_near(record, limit) or best.get(record.backend) is record)
        evidence = comparable or record.label == entry.label
        rows.append(
            dataclasses.replace(
                record,
                reason=None if record.reason is None or (slower and not evidence) else _short(record.reason),
                samples_us=record.samples_us[: MAX_SAMPLES if evidence else int(record.right)],
            )
        )
    return dataclasses.replace(entry, candidates=tuple(rows), rule=_short(entry.rule))


def without_strangers(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of one op without the candidates that raced in none of them, as far as nothing is lost with those.

    Nothing that never raced is ever chosen for another size, so that it lost says nothing. It stays where it came near
    the choice, where it was wrong, and as the best of a backend of which nothing raced: what then runs in the choice's
    place if need be.
    """
    raced = {record.label for entry in entries for record in entry.candidates if record.samples_us}
    found = []
    for entry in entries:
        limit, best = _limit(entry), _best_of_each(entry.candidates, raced_only=False)
        rows = tuple(
            c
            for c in entry.candidates
            if not c.slower or c.label in raced or _near(c, limit) or best.get(c.backend) is c
        )
        found.append(dataclasses.replace(entry, candidates=rows))
    return found


def _limit(entry: Entry) -> float | None:
    """Microseconds of what still came near the choice."""
    return None if entry.chosen.median_us is None else entry.chosen.median_us * (1 + NEAR)


def _near(record: CandidateRecord, limit: float | None) -> bool:
    return limit is not None and record.median_us is not None and record.median_us <= limit


def _best_of_each(records: Sequence[CandidateRecord], raced_only: bool) -> dict[str, CandidateRecord]:
    """By backend: the fastest that raced. If none did, and not ``raced_only``, the fastest by its first calls."""
    best: dict[str, tuple[tuple[bool, float], CandidateRecord]] = {}
    for record in records:
        if not record.right or record.median_us is None or (raced_only and not record.samples_us):
            continue
        order = (not record.samples_us, record.median_us)
        if record.backend not in best or order < best[record.backend][0]:
            best[record.backend] = (order, record)
    return {backend: record for backend, (_, record) in best.items()}


def _short(text: str) -> str:
    words = " ".join(_PATH.sub(r"\1", text).split())
    return words if len(words) <= REASON_CHARACTERS else words[: REASON_CHARACTERS - 1] + "…"
