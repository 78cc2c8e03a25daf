"""The final choice from a race, with the rule that made it and the margins a report shows.

Never an argmin of means. The holder (incumbent, else default) stays unless someone beats it by more than
``min_improvement`` with the interval clear of it; otherwise everyone within ``tie`` of the leader is an equal
and the first in precedence wins. Two noisy runs over near-ties then agree, which an argmin does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from math import expm1, isfinite, log1p
from typing import Any

from ..errors import IsokernError
from .race import RaceResult
from .samples import LogEstimate, percent

__all__ = ["ChoiceRule", "Margin", "NothingToSelectError", "Selection", "select"]


class NothingToSelectError(IsokernError, RuntimeError):
    """The race ended without a survivor: every candidate was withdrawn."""


class ChoiceRule(StrEnum):
    """What decided."""

    ONLY_CANDIDATE = "only-candidate"
    NO_EVIDENCE = "no-evidence"  # not one undisturbed block: precedence alone
    KEPT_INCUMBENT = "kept-incumbent"
    KEPT_DEFAULT = "kept-default"
    FASTEST = "fastest"  # nobody preferred is within a tie of it
    TIE_ORDER = "tie-order"  # precedes the leader, and is its equal


@dataclass(frozen=True, slots=True)
class Margin:
    """How much faster the winner is than ``other``: ``t_other / t_winner - 1``, negative if it is slower.

    Attributes:
        speedup: estimate, e.g. 0.12 for 12 % faster.
        low, high: interval at the promotion policy's significance on each side; None where there are too few
            blocks to give one.
        blocks: paired blocks behind it.
    """

    other: str
    speedup: float
    low: float | None
    high: float | None
    blocks: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice as data.

    Attributes:
        winner: the chosen candidate.
        rule, text: what decided, as a code and in words.
        leader: the fastest survivor by median, which need not be the winner; None without blocks.
        over_runner_up: margin over the fastest other candidate; None if there is no other, or no block.
        over_default: margin over the heuristic default; None if it is the winner or did not race.
    """

    winner: str
    rule: ChoiceRule
    text: str
    leader: str | None
    over_runner_up: Margin | None
    over_default: Margin | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "rule": self.rule.value}


def select(
    result: RaceResult,
    *,
    incumbent: str | None = None,
    default: str | None = None,
) -> Selection:
    """Choose from a race, by the promotion policy it was run with.

    Args:
        incumbent: the stored winner of an earlier run; one that did not race (rejected meanwhile) is ignored.
        default: the heuristic choice, for the report and as the holder if there is no incumbent.

    Raises: NothingToSelectError, if every candidate was withdrawn.
    """
    chooser = _Chooser(result, incumbent, default)
    winner, rule, text = chooser.choose()
    return Selection(
        winner=winner,
        rule=rule,
        text=text,
        leader=chooser.leader,
        over_runner_up=chooser.margin(winner, chooser.runner_up(winner)),
        over_default=chooser.margin(winner, default if default != winner else None),
    )


class _Chooser:
    def __init__(self, result: RaceResult, incumbent: str | None, default: str | None) -> None:
        if not result.survivors:
            raise NothingToSelectError(
                "no candidate survived: "
                + "; ".join(f"{name}: {verdict.reason}" for name, verdict in result.withdrawn.items())
            )
        self.result = result
        self.policy = result.promotion
        # Log ratios; like the race, nothing below the clock's quantum is a difference.
        self.clear = log1p(max(self.policy.min_improvement, result.table.resolution))
        self.tie = log1p(max(self.policy.tie, result.table.resolution))
        self.racing = [c for c in result.precedence if c not in result.withdrawn]
        self.incumbent = incumbent if incumbent in self.racing else None
        self.default = default if default in self.racing else None
        self.holder = self.incumbent or self.default
        self.leader = result.table.leader(result.survivors)

    def choose(self) -> tuple[str, ChoiceRule, str]:
        if len(self.racing) == 1:
            return self.racing[0], ChoiceRule.ONLY_CANDIDATE, "the only candidate that was admitted"
        if self.leader is None:
            first = self.holder or self.result.survivors[0]
            return (
                first,
                ChoiceRule.NO_EVIDENCE,
                f"no undisturbed measurement: took {first} by declared order",
            )
        eligible = list(self.result.survivors)
        if self.holder is not None:
            unseating = self._unseating(self.holder)
            if not unseating:
                return self._kept(self.holder)
            rivals = [c for c in eligible if c != self.holder]
            eligible = [c for c in rivals if self._compare(self.holder, c).centre > self.clear] or unseating
        return self._first_of_equals(eligible)

    def margin(self, winner: str, other: str | None) -> Margin | None:
        if other is None or other not in self.racing:
            return None
        estimate = self._compare(other, winner)
        if estimate.pairs == 0:
            return None
        low, high = (bound(self.policy.significance) for bound in (estimate.low, estimate.high))
        return Margin(
            other=other,
            speedup=expm1(estimate.centre),
            low=expm1(low) if isfinite(low) else None,
            high=expm1(high) if isfinite(high) else None,
            blocks=estimate.pairs,
        )

    def runner_up(self, winner: str) -> str | None:
        """The fastest other survivor; if there is none, the one that was eliminated with the least margin."""
        others = [c for c in self.result.survivors if c != winner] or [c for c in self.racing if c != winner]
        return min(others, key=lambda c: self._compare(c, winner).centre, default=None)

    def _compare(self, a: str, b: str) -> LogEstimate:
        return self.result.table.compare(a, b, self.racing)

    def _unseating(self, holder: str) -> list[str]:
        """Survivors proven to beat the holder by more than ``min_improvement``."""
        rivals = [c for c in self.result.survivors if c != holder]
        tail = self.policy.significance / max(1, len(rivals))
        table = self.result.table
        proven = [c for c in rivals if table.proven_slower(holder, c, self.clear, tail, self.racing)]
        # The race eliminates its holder on a stricter proof, which stands even if the one it lost to is out.
        lost = holder == self.result.holder and holder in self.result.eliminated
        return proven or (rivals if lost else [])

    def _kept(self, holder: str) -> tuple[str, ChoiceRule, str]:
        role, rule = ("default", ChoiceRule.KEPT_DEFAULT)
        if holder == self.incumbent:
            role, rule = ("incumbent", ChoiceRule.KEPT_INCUMBENT)
        challengers = [c for c in self.racing if c != holder]
        best = min(challengers, key=lambda c: self._compare(c, holder).centre)
        faster = self._compare(holder, best)
        needed = f"more than {percent(self.clear)} is needed"
        if faster.centre <= 0.0:
            return holder, rule, f"kept the {role}: no challenger is faster"
        if faster.centre <= self.clear:
            return (
                holder,
                rule,
                f"kept the {role}: best challenger {best} is only {percent(faster.centre)} faster, {needed}",
            )
        return (
            holder,
            rule,
            f"kept the {role}: best challenger {best} measures {percent(faster.centre)} faster, but {needed} "
            f"and that is not proven in {faster.pairs} blocks",
        )

    def _first_of_equals(self, eligible: list[str]) -> tuple[str, ChoiceRule, str]:
        """Of ``eligible`` (in precedence) the first that is not proven slower than their leader by a tie."""
        leader = self.leader if self.leader in eligible else self.result.table.leader(eligible)
        assert leader is not None  # survivors share all kept blocks
        over = ""
        if self.holder is not None:
            over = f", {percent(self._compare(self.holder, leader).centre)} faster than {self.holder}"
        for candidate in eligible:
            if candidate == leader:
                return leader, ChoiceRule.FASTEST, f"fastest: {leader}{over}"
            slower = self._compare(candidate, leader)
            # However noisy, nobody is a tie whose estimate alone would justify a promotion over it.
            if slower.low(self.policy.significance) <= self.tie and slower.centre <= self.clear:
                text = f"tie with the fastest ({leader}, by {percent(slower.centre)}): {candidate} comes first"
                return candidate, ChoiceRule.TIE_ORDER, text
        raise AssertionError("the leader is eligible")
