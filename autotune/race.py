"""The race: interleaved, randomised, complete blocks with early elimination. Pure decision logic.

The caller times, the race decides::

    race = Race(finalists, protected=(incumbent, default), seed=7)
    while not race.finished:
        order = race.next_block()                        # every survivor once, in a fresh random order
        race.record({name: time_once(name) for name in order})
    selection = select(race.result(), incumbent=incumbent, default=default)

Ties are decided by one total order, the *precedence*: protected candidates first, then the declared order.
A candidate is out once it is proven slower than the leader by more than the final choice would forgive it:
``min_improvement`` for the holder, ``tie`` for one that precedes the leader, and the indifference zone for
one that follows it and would lose a tie as well. So what the race eliminates could not have been chosen.

All state follows from the constructor's arguments and the recorded events: a race restored from its exported
state continues exactly as one that was never interrupted.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import log1p
from typing import Any

from ..errors import IsokernError, UnknownNameError
from ..registry.decision import RejectCode, Rejected
from .policy import PromotionPolicy, RacePolicy
from .samples import BlockTable, checked_seconds, percent
from .sentinel import Sentinel

__all__ = ["Race", "RaceError", "RaceResult", "Stop"]

_STATE_VERSION = 1


class RaceError(IsokernError, RuntimeError):
    """The race is driven out of step: a wrong block, a finished race, a state that is not one."""


class Stop(StrEnum):
    """Why a race ended."""

    PROVEN = "proven"  # one candidate is left
    SETTLED = "settled"  # the rest cannot unseat the first in precedence by more than it is forgiven
    BLOCKS = "blocks"  # all rounds are done, some question is still open
    WALL = "wall"  # the wall-clock cap
    DISTURBED = "disturbed"  # too many discarded blocks
    EMPTY = "empty"  # no candidate is left


@dataclass(frozen=True, slots=True)
class RaceResult:
    """What a race found out.

    Attributes:
        precedence: every candidate that entered, in the order that decides ties.
        holder: the one that stays unless clearly beaten; None if nothing was protected or it was withdrawn.
        survivors: neither eliminated nor withdrawn, in precedence.
        eliminated: proven slower, with the reason.
        withdrawn: removed by the caller, with its reason.
        table: all kept blocks.
        stop: why the race ended; None if it has not.
        discarded: disturbed blocks that were thrown away.
        rebased: how often the sentinel settled on a new level; above 0 the machine was throttled or shared.
        wall_s: seconds spent, discarded blocks included.
        promotion: the thresholds it was run with.
    """

    precedence: tuple[str, ...]
    holder: str | None
    survivors: tuple[str, ...]
    eliminated: Mapping[str, Rejected]
    withdrawn: Mapping[str, Rejected]
    table: BlockTable
    stop: Stop | None
    discarded: int
    rebased: int
    wall_s: float
    promotion: PromotionPolicy


class Race:
    """A state machine: ``next_block``, ``record``, and so on until ``finished``.

    Args:
        candidates: unique names in declared order.
        protected: candidates that precede all others, most important first (incumbent, then default).
            The first is the holder, which stays unless clearly beaten.
        policy, promotion: thresholds.
        seed: makes the block orders reproducible.
        resolution: the clock's quantum relative to one sample; no smaller difference is ever proven.

    Raises: ValueError for repeated candidates, UnknownNameError for a protected name that is no candidate.
    """

    def __init__(
        self,
        candidates: Sequence[str],
        protected: Sequence[str] = (),
        policy: RacePolicy | None = None,
        promotion: PromotionPolicy | None = None,
        *,
        seed: int = 0,
        resolution: float = 0.0,
    ) -> None:
        if len(set(candidates)) != len(candidates):
            raise ValueError(f"candidates: expected unique names, given {tuple(candidates)!r}")
        for name in protected:
            if name not in candidates:
                raise UnknownNameError("candidate", name, candidates)
        self.candidates = tuple(candidates)
        self.protected = tuple(dict.fromkeys(protected))
        self.policy = policy or RacePolicy()
        self.promotion = promotion or PromotionPolicy()
        self.seed = seed
        self.precedence = self.protected + tuple(c for c in self.candidates if c not in self.protected)
        self.holder = self.protected[0] if self.protected else None
        self.survivors = self.precedence
        self.eliminated: dict[str, Rejected] = {}
        self.withdrawn: dict[str, Rejected] = {}
        self.table = BlockTable(resolution)
        self.discarded = 0
        self.wall_s = 0.0
        self.stop: Stop | None = None
        self._beaten_by: dict[str, str] = {}
        self._events: list[dict[str, Any]] = []
        self._attempts = 0
        self._sentinel = Sentinel(self.policy)
        self._stop_if_decided()

    @property
    def finished(self) -> bool:
        return self.stop is not None

    @property
    def events(self) -> Sequence[Mapping[str, Any]]:
        """Everything recorded so far, as JSON types; a journal appends the last one after each call."""
        return copy.deepcopy(self._events)

    def next_block(self) -> tuple[str, ...]:
        """Every survivor once, in a random order; the same until one is recorded. Raises: RaceError."""
        if self.finished:
            raise RaceError(f"the race is over ({self.stop})")
        order = list(self.survivors)
        # Seeded by the attempt alone, so that a restored race draws the same orders.
        random.Random(f"{self.seed}:{self._attempts}").shuffle(order)
        return tuple(order)

    def record(
        self,
        times: Mapping[str, float],
        *,
        wall_s: float | None = None,
        sentinel_s: float | None = None,
        disturbed: bool = False,
    ) -> bool:
        """Record one block, and look at the data when a round is complete.

        Args:
            times: seconds per launch, of exactly the candidates of ``next_block``.
            wall_s: what the block cost in all; the sum of ``times`` if not given.
            sentinel_s: time of the fixed sentinel kernel within the block.
            disturbed: the caller knows that the block is no good.

        Returns: True if the block counts, False if it was discarded as disturbed (wait a moment then).
        Raises: RaceError, TimingError; the race is as before then.
        """
        if self.finished:
            raise RaceError(f"the race is over ({self.stop})")
        if set(times) != set(self.survivors):
            raise RaceError(f"a block must time exactly {sorted(self.survivors)}, given {sorted(times)}")
        checked = {name: checked_seconds(name, t) for name, t in times.items()}
        wall = sum(checked.values()) if wall_s is None else checked_seconds("wall clock", wall_s)
        sentinel = None if sentinel_s is None else checked_seconds("sentinel", sentinel_s)
        self._events.append({"times": checked, "wall_s": wall, "sentinel_s": sentinel, "disturbed": bool(disturbed)})
        self._attempts += 1
        self.wall_s += wall
        kept = not disturbed and (sentinel is None or self._sentinel.steady(sentinel))
        if kept:
            self.table.append(checked)
            if len(self.table) in self.policy.looks and len(self.table) >= self.policy.min_blocks:
                self._eliminate()
            self._stop_if_decided()
        else:
            self.discarded += 1
        self._stop_if_spent()
        return kept

    def withdraw(self, candidate: str, verdict: Rejected) -> None:
        """Take out a survivor that failed while racing; those it had eliminated are back in.

        Raises: RaceError, UnknownNameError.
        """
        if candidate not in self.precedence:
            raise UnknownNameError("candidate", candidate, self.precedence)
        if self.finished or candidate not in self.survivors:
            raise RaceError(f"candidate {candidate!r} is not racing")
        self._events.append({"withdraw": candidate, "code": verdict.code.value, "reason": verdict.reason})
        self.withdrawn[candidate] = verdict
        for name in [n for n, winner in self._beaten_by.items() if winner == candidate]:
            del self.eliminated[name], self._beaten_by[name]
        gone = self.eliminated.keys() | self.withdrawn.keys()
        self.survivors = tuple(c for c in self.precedence if c not in gone)
        if candidate == self.holder:
            self.holder = next((p for p in self.protected if p in self.survivors), None)
        self._stop_if_decided()

    def result(self) -> RaceResult:
        """A snapshot; final once ``finished``."""
        return RaceResult(
            precedence=self.precedence,
            holder=self.holder,
            survivors=self.survivors,
            eliminated=dict(self.eliminated),
            withdrawn=dict(self.withdrawn),
            table=self.table,
            stop=self.stop,
            discarded=self.discarded,
            rebased=self._sentinel.rebased,
            wall_s=self.wall_s,
            promotion=self.promotion,
        )

    def export(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere, as JSON types: arguments, and every recorded event."""
        return {
            "version": _STATE_VERSION,
            "candidates": list(self.candidates),
            "protected": list(self.protected),
            "policy": {**asdict(self.policy), "rounds": list(self.policy.rounds)},
            "promotion": asdict(self.promotion),
            "seed": self.seed,
            "resolution": self.table.resolution,
            "events": copy.deepcopy(self._events),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Race:
        """The race that ``export`` described, by replaying its events. Raises: RaceError."""
        try:
            if state["version"] != _STATE_VERSION:
                raise RaceError(f"race state: expected version {_STATE_VERSION}, given {state['version']!r}")
            race = cls(
                state["candidates"],
                state["protected"],
                RacePolicy.from_dict(state["policy"]),
                PromotionPolicy(**state["promotion"]),
                seed=state["seed"],
                resolution=state["resolution"],
            )
            race._replay(state["events"])
        except (KeyError, TypeError, ValueError) as error:
            raise RaceError(f"race state: unusable ({type(error).__name__}: {error})") from error
        return race

    def _replay(self, events: Iterable[Mapping[str, Any]]) -> None:
        for event in events:
            if "withdraw" in event:
                self.withdraw(event["withdraw"], Rejected(RejectCode(event["code"]), event["reason"]))
            else:
                self.record(
                    event["times"],
                    wall_s=event["wall_s"],
                    sentinel_s=event["sentinel_s"],
                    disturbed=event["disturbed"],
                )

    def _forgiven_log(self, candidate: str, rival: str) -> float:
        """How much slower (log ratio) than ``rival`` may ``candidate`` be and still be chosen over it?"""
        if candidate == self.holder:
            ratio = self.promotion.min_improvement
        elif self.precedence.index(candidate) < self.precedence.index(rival):
            ratio = self.promotion.tie
        else:
            ratio = 0.0  # it would lose a tie as well
        return log1p(max(ratio, self.policy.indifference, self.table.resolution))

    def _eliminate(self) -> None:
        leader = self.table.leader(self.survivors)
        if leader is None:
            return
        tail = self.policy.significance / (len(self.policy.looks) * max(1, len(self.precedence) - 1))
        out: dict[str, Rejected] = {}
        for name in self.survivors:
            if name == leader:
                continue
            forgiven = self._forgiven_log(name, leader)
            if self.table.proven_slower(name, leader, forgiven, tail, self.survivors):
                slower = self.table.compare(name, leader, self.survivors)
                out[name] = Rejected(
                    RejectCode.SLOW,
                    f"{percent(slower.centre)} slower than {leader} (at least {percent(slower.low(tail))}) "
                    f"after {slower.pairs} blocks",
                )
        self.eliminated.update(out)
        self._beaten_by.update(dict.fromkeys(out, leader))
        self.survivors = tuple(c for c in self.survivors if c not in out)

    def _stop_if_decided(self) -> None:
        if len(self.survivors) <= 1:
            self.stop = Stop.PROVEN if self.survivors else Stop.EMPTY
        elif len(self.table) in self.policy.looks and len(self.table) >= self.policy.min_blocks:
            first, rivals = self.survivors[0], self.survivors[1:]
            tail = self.promotion.significance / len(rivals)
            if all(
                self.table.proven_slower(r, first, -self._forgiven_log(first, r), tail, self.survivors) for r in rivals
            ):
                self.stop = Stop.SETTLED
            elif len(self.table) == self.policy.max_blocks:
                self.stop = Stop.BLOCKS

    def _stop_if_spent(self) -> None:
        if self.finished:
            return
        if self.discarded >= self.policy.max_discarded:
            self.stop = Stop.DISTURBED
        elif self.wall_s >= self.policy.wall_cap_s and len(self.table) >= self.policy.min_blocks:
            self.stop = Stop.WALL
