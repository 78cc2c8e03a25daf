"""What would be fastest for a size that nothing was tuned for, judged by what every candidate took at sizes near it.

A near entry's winner need not be the best here: another candidate may have lost to it by a percent and win at all other
sizes around. So each candidate is expected to lose what it lost at the near sizes, to the best there, on weighted
average; the one expected to lose least runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..cache.candidate import CandidateRecord
from ..cache.entry import Entry
from ..cache.neighbours import Neighbour
from .decision import RejectCode

__all__ = ["Forecast", "forecast", "typical_us"]

#: How the weight of an entry falls with its distance: by the square, and one that differs in nothing stays finite.
_NEAREST = 0.5
#: Losses are not told apart beyond a factor of two: slower ones are not timed well, or not at all.
_CAP = math.log(2.0)
#: How much of the entries' weight must know a candidate: what distant entries alone know of it is of other sizes than
#: what is known of its rivals. From 0.7 to 0.9 two stores are foretold about as well, with half one batch took twice
#: its time.
_SUPPORT = 0.7
#: What a doubling away must promise at least, as a fraction of the time, to leave the default or an entry's winner.
_DOUBT = 0.01
#: As many as go from the first calls to the race.
_FINALISTS = 8
#: Found wrong or broken, not just slow or not asked: never taken anywhere near.
_BROKEN = frozenset(
    {
        RejectCode.COMPILE,
        RejectCode.RAISED,
        RejectCode.WRONG,
        RejectCode.NON_FINITE,
        RejectCode.INPUT_MODIFIED,
        RejectCode.CANARY,
        RejectCode.NOT_REPEATABLE,
        RejectCode.CRASH,
        RejectCode.TIMEOUT,
        RejectCode.MEMORY,
        RejectCode.IMPOSSIBLE,
    }
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The candidate that is expected to lose least.

    Attributes:
        record: the candidate, as the nearest entry that knows it has it.
        loss: expected, as the logarithm of its time over the best's.
        default_loss: of the heuristic choice; None if there is none.
        by: the entries that it was judged by, closest first.
    """

    record: CandidateRecord
    loss: float
    default_loss: float | None
    by: tuple[Neighbour, ...]

    @property
    def text(self) -> str:
        """In words, with the entries and how their keys differ."""
        default = "" if self.default_loss is None else f", the heuristic choice {_percent(self.default_loss)}"
        entries = "; ".join(_name(near) for near in self.by)
        plural = "a batch" if len(self.by) == 1 else f"{len(self.by)} batches"
        return f"expected to lose {_percent(self.loss)} to the best{default}, by {plural} like it: {entries}"


def _percent(loss: float) -> str:
    return f"{100 * math.expm1(loss):.1f} %"


def _name(near: Neighbour) -> str:
    unlike = ", ".join(f"{name} {stored} for {wanted}" for name, (wanted, stored) in near.differences.items())
    return f"{near.located.layer_name} store's {near.located.entry.key_hash} ({unlike})"


def forecast(
    near: Sequence[Neighbour],
    offered: Callable[[CandidateRecord], bool],
    default: str | None,
    fingerprints: Mapping[str, str],
) -> Forecast | None:
    """The candidate to run where nothing is tuned but ``near`` is; None if that says nothing.

    A candidate must have been proven (raced, so through the gate) at one of the near sizes and broken at none. The
    default, then the entries' winners, closest first, stay ahead of candidates that promise hardly more. Where the
    default came into the race of none of them they are of another regime (it may have been too slow there, or only this
    size is long enough to be cut), and have nothing to hold against it: None.

    Args:
        near: closest first. offered: whether a candidate is offered for this size. default: ``backend[config]`` of
            the heuristic choice. fingerprints: current one of each backend; what was measured of others is forgotten.
    """
    judged = [(entry, found) for entry in near if (found := _losses(entry.located.entry, fingerprints))]
    if not judged:
        return None
    weights = [(entry.away + _NEAREST) ** -2 for entry, _ in judged]
    records = _proven([entry.located.entry for entry, _ in judged], fingerprints)
    expected: dict[str, float] = {}
    for label, record in records.items():
        known = [(w, found[label]) for w, (_, found) in zip(weights, judged, strict=True) if label in found]
        support = sum(w for w, _ in known)
        if support >= _SUPPORT * sum(weights) and offered(record):
            expected[label] = sum(w * loss for w, loss in known) / support
    if not expected:
        return None
    if default is not None and default not in expected:
        return None
    enough = min(expected.values()) + _DOUBT * judged[0][0].away
    preferred = (default, *(entry.located.entry.label for entry, _ in judged))
    least = min(expected, key=lambda label: (expected[label], label))
    choice = next((label for label in preferred if label in expected and expected[label] <= enough), least)
    by = tuple(entry for entry, found in judged if choice in found)
    return Forecast(records[choice], expected[choice], None if default is None else expected.get(default), by)


def _proven(entries: Sequence[Entry], fingerprints: Mapping[str, str]) -> dict[str, CandidateRecord]:
    fresh = [record for entry in entries for record in entry.fresh_candidates(fingerprints)]
    broken = {record.label for record in fresh if record.code in _BROKEN}
    proven: dict[str, CandidateRecord] = {}
    for record in fresh:
        if record.samples_us and record.label not in broken:
            proven.setdefault(record.label, record)
    return proven


def typical_us(entry: Entry, fingerprints: Mapping[str, str]) -> dict[str, float]:
    """Microseconds per call of each candidate of ``entry`` that is right; inf if it was too slow to be called.

    Those that were put aside after their first calls have no other time than those calls', which flatter: nothing else
    runs between them. They count as no faster than the last that could be in the race. Empty if none raced.
    """
    fresh = [c for c in entry.fresh_candidates(fingerprints) if c.status == "ok" or c.code == RejectCode.SLOW]
    raced = {c.label: c.median_us for c in fresh if c.samples_us and c.median_us}
    if not raced:
        return {}
    last = sorted(raced.values())[min(_FINALISTS, len(raced)) - 1]
    return {c.label: raced.get(c.label) or (max(c.median_us, last) if c.median_us else math.inf) for c in fresh}


def _losses(entry: Entry, fingerprints: Mapping[str, str]) -> dict[str, float]:
    """What each candidate lost to the best of ``entry``, as the logarithm of the ratio of their times."""
    found = typical_us(entry, fingerprints)
    best = min(found.values(), default=math.inf)
    return {label: min(_CAP, math.log(us / best)) for label, us in found.items()}
