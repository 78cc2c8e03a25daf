"""The screen: a few samples of every candidate decide who is worth racing.

The caller does the timing, in any order it likes; visiting the candidates in passes (one sample each, again
and again) spreads clock drift over all of them and is better than finishing one after the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import IsokernError, UnknownNameError
from ..registry.decision import RejectCode, Rejected
from .policy import ScreenPolicy
from .samples import checked_seconds, format_seconds

__all__ = ["Screen", "ScreenResult", "UnfinishedScreenError"]


class UnfinishedScreenError(IsokernError, RuntimeError):
    """The screen is asked for finalists while candidates have no samples. Attribute: ``missing``."""

    def __init__(self, missing: Sequence[str]) -> None:
        self.missing = tuple(missing)
        super().__init__(f"the screen still needs samples of: {', '.join(map(repr, self.missing))}")


@dataclass(frozen=True, slots=True)
class ScreenResult:
    """Attributes:
    finalists: who goes to the race, in declared order.
    dropped: everyone else, with the reason (code ``SLOW``).
    medians: seconds, per candidate; of an abandoned one over what there is.
    samples: seconds, per candidate, without its first call.
    """

    finalists: tuple[str, ...]
    dropped: Mapping[str, Rejected]
    medians: Mapping[str, float]
    samples: Mapping[str, tuple[float, ...]]


class Screen:
    """Collects first calls and samples, abandons the hopeless early, picks the finalists.

    Args:
        candidates: unique names in declared order.
        protected: never abandoned and never dropped (heuristic default, incumbent).

    Raises: ValueError for repeated candidates, UnknownNameError for a protected name that is no candidate.
    """

    def __init__(
        self, candidates: Sequence[str], protected: Iterable[str] = (), policy: ScreenPolicy | None = None
    ) -> None:
        self.policy = policy or ScreenPolicy()
        self.candidates = tuple(candidates)
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError(f"candidates: expected unique names, given {self.candidates!r}")
        self.protected = frozenset(protected)
        for name in self.protected.difference(self.candidates):
            raise UnknownNameError("candidate", name, self.candidates)
        self._first: dict[str, float] = {}
        self._samples: dict[str, list[float]] = {name: [] for name in self.candidates}
        self._typical: dict[str, float] = {}  # the median of the samples, before there are any the first call
        self._dropped: dict[str, Rejected] = {}

    def wants(self, candidate: str) -> int:
        """Calls of ``candidate`` still to be timed, its first one included; 0 when done or abandoned."""
        self._known(candidate)
        if candidate in self._dropped:
            return 0
        return (candidate not in self._first) + self.policy.first_samples - len(self._samples[candidate])

    def pending(self) -> tuple[str, ...]:
        """Candidates that want at least one more call: one pass, in declared order."""
        return tuple(name for name in self.candidates if self.wants(name))

    def record(self, candidate: str, seconds: float) -> bool:
        """Record one call; a candidate's first one counts as its warm-up and never as a sample.

        Returns: True if the candidate wants more. Raises: TimingError, UnknownNameError, or ValueError for a
        call nobody asked for; nothing is recorded then.
        """
        if not self.wants(candidate):
            raise ValueError(f"candidate {candidate!r}: wants no more samples")
        value = checked_seconds(candidate, seconds)
        if candidate in self._first:
            self._samples[candidate].append(value)
            self._typical[candidate] = statistics.median(self._samples[candidate])
        else:
            self._first[candidate] = self._typical[candidate] = value
        if candidate not in self.protected:
            self._abandon_if_hopeless(candidate)
        return self.wants(candidate) > 0

    def remove(self, candidate: str) -> None:
        """Forget a candidate that failed in another way (crash, timeout); that is no verdict of the screen."""
        self._known(candidate)
        self.candidates = tuple(name for name in self.candidates if name != candidate)
        self.protected = self.protected - {candidate}
        del self._samples[candidate]
        self._first.pop(candidate, None)
        self._typical.pop(candidate, None)
        self._dropped.pop(candidate, None)

    def result(self) -> ScreenResult:
        """Finalists: all protected, and the ``keep`` fastest others within ``drop_ratio`` of the best.

        Raises: UnfinishedScreenError.
        """
        pending = self.pending()
        if pending:
            raise UnfinishedScreenError(pending)
        medians = {name: self._typical[name] for name in self.candidates}
        dropped = dict(self._dropped)
        best = min(medians.values(), default=0.0)
        contenders = sorted(
            (n for n in self.candidates if n not in self.protected and n not in dropped),
            key=medians.__getitem__,
        )  # stable: of equals, the first declared
        for rank, name in enumerate(contenders):
            typical = f"median {format_seconds(medians[name])}"
            if medians[name] > self.policy.drop_ratio * best:
                text = f"{typical}, {medians[name] / best:.2f}x the best ({format_seconds(best)})"
            elif rank >= self.policy.keep:
                text = f"{typical}, rank {rank + 1}: only {self.policy.keep} go to the race"
            else:
                continue
            dropped[name] = Rejected(RejectCode.SLOW, text)
        finalists = tuple(name for name in self.candidates if name not in dropped)
        samples = {name: tuple(times) for name, times in self._samples.items()}
        return ScreenResult(finalists, dropped, medians, samples)

    def _abandon_if_hopeless(self, candidate: str) -> None:
        calls = [self._first[candidate], *self._samples[candidate]]
        best = min(self._typical.values())
        if len(calls) >= self.policy.abandon_calls and min(calls) > self.policy.abandon_ratio * best:
            self._dropped[candidate] = Rejected(
                RejectCode.SLOW,
                f"abandoned after {len(calls)} calls, none under {format_seconds(min(calls))}: "
                f"{min(calls) / best:.1f}x the best so far ({format_seconds(best)})",
            )

    def _known(self, candidate: str) -> None:
        if candidate not in self._samples:
            raise UnknownNameError("candidate", candidate, self.candidates)
