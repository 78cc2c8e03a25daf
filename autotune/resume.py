"""What an interrupted tuning run of one problem had finished: verdicts, screen passes, race blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from ..cache.codec import digest
from ..cache.journal import Journal
from ..registry.decision import RejectCode, Rejected
from .candidates import Candidate

__all__ = ["Resume", "Verdict", "field_digest"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of one candidate.

    Attributes:
        rejected: why not; None if it is proven.
        tags: what was proven besides: ``conformant``, ``repeatable``.
        first_s: its fastest first call in seconds, where it got that far.
        peak_bytes: most memory it held in the gate beyond what was there; None if unknown.
    """

    rejected: Rejected | None
    tags: tuple[str, ...] = ()
    first_s: float | None = None
    peak_bytes: int | None = None

    @property
    def proven(self) -> bool:
        return self.rejected is None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Raises: KeyError, TypeError, ValueError for what :meth:`to_dict` did not write."""
        why = record["rejected"]
        rejected = None if why is None else Rejected(RejectCode(why["code"]), str(why["reason"]))
        return cls(rejected, tuple(record["tags"]), record["first_s"], record["peak_bytes"])


def field_digest(candidates: Sequence[Candidate]) -> str:
    """Identity of a field of contestants: timings of one field say nothing about another."""
    return digest([[c.name, c.fingerprint] for c in candidates])


class Resume:
    """The journal of one problem, read once and written as the run goes on.

    Args:
        journal: where it is kept. signature: what a record depends on besides the candidate (policies, case,
            version); records under another signature are discarded.
    """

    def __init__(self, journal: Journal, signature: str) -> None:
        self._journal = journal
        self._signature = signature
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._contests: dict[str, list[dict[str, Any]]] = {}
        self.resumed = False
        records = journal.records()
        if records and records[0] != self._head():
            journal.discard()
            records = ()
        self._begun = bool(records)
        for record in records[1:]:
            self._take(record)

    def _head(self) -> dict[str, Any]:
        return {"kind": "start", "signature": self._signature}

    def _take(self, record: dict[str, Any]) -> None:
        try:
            if record["kind"] == "verdict":
                self._verdicts[record["name"], record["fingerprint"]] = Verdict.from_dict(record["verdict"])
            elif record["kind"] == "contest":
                self._contests.setdefault(record["field"], []).append(record["event"])
        except (KeyError, TypeError, ValueError):
            return  # another version's record: that step is done again
        self.resumed = True

    def _append(self, record: Mapping[str, Any]) -> None:
        if not self._begun:
            self._journal.append(self._head())
            self._begun = True
        self._journal.append(record)

    def verdict(self, candidate: Candidate) -> Verdict | None:
        """The verdict on exactly this candidate, fingerprint included, if there is one."""
        return self._verdicts.get((candidate.name, candidate.fingerprint))

    def remember(self, candidate: Candidate, verdict: Verdict) -> None:
        """Keep a verdict."""
        self._verdicts[candidate.name, candidate.fingerprint] = verdict
        self._append(
            {
                "kind": "verdict",
                "name": candidate.name,
                "fingerprint": candidate.fingerprint,
                "verdict": verdict.to_dict(),
            }
        )

    def events(self, field: str) -> tuple[Mapping[str, Any], ...]:
        """What a contest of this field had recorded, in order."""
        return tuple(self._contests.get(field, ()))

    def recorder(self, field: str) -> Callable[[Mapping[str, Any]], None]:
        """A function that keeps one more event of that contest."""
        return lambda event: self._append({"kind": "contest", "field": field, "event": dict(event)})

    def discard(self) -> None:
        """The result is published: nothing to resume."""
        self._journal.discard()
        self._begun = False
