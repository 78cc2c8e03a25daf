"""Screen and race of the proven candidates, timed in a worker that runs nothing else.

Decisions are those of :mod:`.screen` and :mod:`.race`; here samples are fetched, failures turned into verdicts, and
every pass and block is recorded, so that a contest killed at any point goes on after its last whole block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..registry.decision import RejectCode, Rejected
from .candidates import Candidate
from .examine import MAX_CRASHES, bind_candidate, load_problem
from .policy import TunePolicy
from .progress import Progress
from .race import Race, RaceResult
from .recipe import ProblemRecipe
from .samples import below_floor, format_seconds
from .screen import Screen, ScreenResult
from .worker import CandidateFailure, Worker, WorkerError

__all__ = ["Contest", "Standing"]

#: Samples in a row below the floor that prove a candidate does not do the work. One proves only that the machine,
#: whose bandwidth the floor comes from, was busier then than now.
_PROOF_OF_CHEATING = 3


@dataclass(frozen=True, slots=True)
class Standing:
    """How a contest ended.

    Attributes:
        screened: the screen's result; None if nobody was left for it.
        raced: the race's result; None if nobody was left for it.
        failed: candidates that broke while being timed, with the reason.
        launches: calls timed, over all candidates. method: the timer, in words.
    """

    screened: ScreenResult | None
    raced: RaceResult | None
    failed: Mapping[str, Rejected]
    launches: int
    method: str


class Contest:
    """One problem's screen and race.

    Args:
        worker: used by no candidate that is not proven.
        candidates: the proven ones, in heuristic order.
        protected: incumbent and default, as far as they are among the candidates.
        events: what an earlier run of this very contest recorded. record: keeps one event more.
    """

    def __init__(
        self,
        worker: Worker,
        recipe: ProblemRecipe,
        key: dict[str, Any],
        candidates: Sequence[Candidate],
        protected: Iterable[str],
        policy: TunePolicy,
        progress: Progress,
        events: Sequence[Mapping[str, Any]] = (),
        record: Callable[[Mapping[str, Any]], None] = lambda event: None,
    ) -> None:
        self.worker = worker
        self.recipe = recipe
        self.key = key
        self.candidates = {c.name: c for c in candidates}
        self.protected = tuple(protected)
        self.policy = policy
        self.progress = progress
        self.failed: dict[str, Rejected] = {}
        self.launches = 0
        self.method = ""
        self._past = list(events)
        self._record = record
        self._crashes: Counter[str] = Counter()
        self._ready_in: int | None = None
        self._bound: set[str] = set()
        self._timed = False
        self._floor_s = 0.0

    def run(self) -> Standing:
        """Screen, then race.

        Raises:
            WorkerError: no worker can be had, or it dies with no candidate running.
        """
        screened = self._screen()
        if screened is None:
            return self._standing(None, None)
        return self._standing(screened, self._race(screened))

    def _standing(self, screened: ScreenResult | None, raced: RaceResult | None) -> Standing:
        return Standing(screened, raced, dict(self.failed), self.launches, self.method)

    # ---- screen

    def _screen(self) -> ScreenResult | None:
        screen = Screen(tuple(self.candidates), self.protected, self.policy.screen)
        self.progress.stage("screen", screen.policy.first_samples + 1)
        while self._past and "pass" in self._past[0]:
            self._replay_pass(screen, self._past.pop(0))
        while pending := screen.pending():
            block = self._time(pending)
            event = {"pass": block["seconds"], **self._gone(), "launches": self._counted(block), "method": self.method}
            self._record(event)
            self._replay_pass(screen, event)
        return screen.result() if screen.candidates else None

    def _replay_pass(self, screen: Screen, event: Mapping[str, Any]) -> None:
        self._recall(event)
        for name in self.failed:
            if name in screen.candidates:
                screen.remove(name)
        for name, seconds in event["pass"].items():
            if name in screen.candidates and screen.wants(name):
                screen.record(name, seconds)
        self.progress.advance(f"{len(screen.pending())} to go on")

    # ---- race

    def _race(self, screened: ScreenResult) -> RaceResult:
        race = Race(
            screened.finalists,
            [name for name in self.protected if name in screened.finalists],
            self.policy.race,
            self.policy.promotion,
            seed=self.recipe.seed,
        )
        self.progress.stage("race", self.policy.race.max_blocks)
        for event in self._past:
            if not race.finished:
                self._replay_block(race, event)
        while not race.finished:
            block = self._time(race.next_block())
            event = {
                "block": block["seconds"],
                "sentinel_s": block["sentinel_s"],
                "wall_s": block["wall_s"],
                **self._gone(),
                "launches": self._counted(block),
                "method": self.method,
            }
            self._record(event)
            self._replay_block(race, event)
        return race.result()

    def _replay_block(self, race: Race, event: Mapping[str, Any]) -> None:
        self._recall(event)
        for name, verdict in self.failed.items():
            if name in race.survivors and not race.finished:
                race.withdraw(name, verdict)
        # A withdrawal may bring back whom it had eliminated; then the block is incomplete, and not a block.
        if not race.finished and set(event["block"]) == set(race.survivors):
            kept = race.record(event["block"], wall_s=event["wall_s"], sentinel_s=event["sentinel_s"])
            self.progress.advance(f"{len(race.survivors)} left" if kept else "disturbed, discarded")

    # ---- samples

    def _time(self, names: Sequence[str]) -> dict[str, Any]:
        """One block; of those that break in it, or cheat, a verdict in ``failed`` and no sample."""
        wanted = [name for name in names if name not in self.failed]
        while wanted:
            try:
                self._prepare(wanted)
                block = self.worker.request("time_block", self.worker.limits.call, names=wanted)
                honest = {name: s for name, s in block["seconds"].items() if not self._impossible(name, s)}
            except CandidateFailure as failure:
                self._blame(failure)
                wanted = [name for name in wanted if name not in self.failed]
                continue
            return {**block, "seconds": honest}
        return {"seconds": {}, "launches": {}, "sentinel_s": None, "wall_s": None}

    def _prepare(self, names: Sequence[str]) -> None:
        """Have a worker with the problem and a bench, and ``names`` bound in it, and warm unless never timed."""
        if not (self.worker.alive and self.worker.pid == self._ready_in):
            load_problem(self.worker, self.recipe, self.key)
            measure = replace(self.policy.measure, mode=self.recipe.mode)
            facts = self.worker.request("bench", self.worker.limits.load, policy=asdict(measure))
            self.method = facts["method"]
            self._floor_s = min(facts["floor_s"], self._floor_s or facts["floor_s"])
            self._bound.clear()
            self._ready_in = self.worker.pid
        fresh = [name for name in names if name not in self._bound]
        for name in fresh:
            try:
                bind_candidate(self.worker, self.candidates[name])
            except CandidateFailure as failure:
                failure.at = name
                raise
            self._bound.add(name)
        if fresh and self._timed:  # another worker than the one that took the first calls: those here are no samples
            self.worker.request("time_block", self.worker.limits.call, names=fresh)

    def _blame(self, failure: CandidateFailure) -> None:
        name, verdict = failure.at, failure.verdict
        if name is None:
            raise WorkerError(f"the timing worker failed with no candidate running: {verdict.reason}") from failure
        self.worker.kill()
        if verdict.code is RejectCode.CRASH:
            self._crashes[name] += 1
            if self._crashes[name] < MAX_CRASHES:
                self.progress.note(f"{name}: {verdict.reason}")
                return
        self.failed[name] = Rejected(verdict.code, f"proven, but while being timed: {verdict.reason}")

    def _impossible(self, name: str, seconds: float) -> bool:
        """Whether ``name`` is faster than the memory allows: the bandwidth is measured again, and so is ``name``.

        Settled before the sample counts: one that does no work would make all others look hopeless.
        """
        for attempt in range(_PROOF_OF_CHEATING):
            if attempt:
                block = self.worker.request("time_block", self.worker.limits.call, names=[name])
                seconds = block["seconds"][name]
            if not self._below_floor(seconds):
                return False
            floor = self.worker.request("floor", self.worker.limits.load)
            self._floor_s = min(self._floor_s, floor["floor_s"])
            if not self._below_floor(seconds):
                return False
        self.failed[name] = Rejected(
            RejectCode.IMPOSSIBLE,
            f"{format_seconds(seconds)} per call, while moving its least bytes takes {format_seconds(self._floor_s)} "
            "at this machine's best bandwidth",
        )
        return True

    def _below_floor(self, seconds: float) -> bool:
        return below_floor(seconds, self._floor_s, self.policy.measure.floor_tolerance)

    # ---- the record

    def _gone(self) -> dict[str, Any]:
        return {"failed": {name: [v.code.value, v.reason] for name, v in self.failed.items()}}

    def _counted(self, block: Mapping[str, Any]) -> int:
        return self.launches + sum(int(n) for n in block["launches"].values())

    def _recall(self, event: Mapping[str, Any]) -> None:
        self.failed = {name: Rejected(RejectCode(code), reason) for name, (code, reason) in event["failed"].items()}
        self.launches = event["launches"]
        self._timed = True
        self.method = event["method"]
