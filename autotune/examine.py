"""The gate's side of the tuner: every candidate is proven, in a process of its own, before anything is timed.

The worker that examines is never the one that times: a candidate that scribbled over memory, printed, or left a
broken device behind has not been anywhere near a measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..registry.decision import RejectCode, Rejected
from .candidates import Candidate
from .policy import ScreenPolicy
from .progress import Progress
from .recipe import ProblemRecipe
from .resume import Resume, Verdict
from .samples import format_seconds
from .worker import CandidateFailure, Worker, WorkerError

__all__ = ["MAX_CRASHES", "Examiner", "GatePolicy"]

#: Deaths of the worker after which a candidate is out. One may be the machine's fault.
MAX_CRASHES = 2

#: After these the worker's memory may not be what it should be, and the next candidate must not suffer for it.
_TAINTING = frozenset({RejectCode.CRASH, RejectCode.TIMEOUT, RejectCode.CANARY, RejectCode.INPUT_MODIFIED})


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """How hard a candidate is looked at.

    Attributes:
        seeds: how many value seeds, besides the adversarial layout.
        max_token_heads: tokens times value heads that the float64 reference computes per run; beyond it a subset
            of the heads stands for all, since heads are independent. The reference takes some 10 us each.
    """

    seeds: int = 2
    max_token_heads: int = 4096


class Examiner:
    """Examines the candidates of one problem in ``worker``.

    Args:
        key: the problem's key; the worker must arrive at the same one from the recipe.
        protected: candidates that are gated even if they are hopelessly slow.
    """

    def __init__(
        self,
        worker: Worker,
        recipe: ProblemRecipe,
        key: dict[str, Any],
        gate: GatePolicy,
        screen: ScreenPolicy,
        resume: Resume,
        progress: Progress,
        protected: Iterable[str] = (),
    ) -> None:
        self.worker = worker
        self.recipe = recipe
        self.key = key
        self.gate = gate
        self.screen = screen
        self.resume = resume
        self.progress = progress
        self.protected = frozenset(protected)
        self._loaded_in: int | None = None
        self._best: float | None = None

    def examine(self, candidates: Sequence[Candidate]) -> dict[str, Verdict]:
        """A verdict on each, protected ones first; remembered one by one, so that none is made twice.

        Raises:
            WorkerError: no worker can be had, or the problem cannot be built.
        """
        self.progress.stage("gate", len(candidates))
        verdicts: dict[str, Verdict] = {}
        for candidate in sorted(candidates, key=lambda c: c.name not in self.protected):
            verdict = self.resume.verdict(candidate)
            if verdict is None:
                verdict = self._verdict(candidate)
                self.resume.remember(candidate, verdict)
            verdicts[candidate.name] = verdict
            if verdict.proven and verdict.first_s is not None:
                self._best = min(verdict.first_s, self._best or verdict.first_s)
            outcome = "proven" if verdict.rejected is None else verdict.rejected.code.value
            self.progress.advance(f"{candidate.name}: {outcome}")
        if self._loaded_in is not None and self.worker.pid == self._loaded_in and self.worker.alive:
            self.worker.request("unload", self.worker.limits.load)
        return verdicts

    def _verdict(self, candidate: Candidate) -> Verdict:
        failure: CandidateFailure | None = None
        for _ in range(MAX_CRASHES):
            self._load()
            try:
                verdict = self._attempt(candidate)
            except CandidateFailure as raised:
                failure = raised
                if raised.verdict.code in _TAINTING or self.recipe.device != "cpu":  # a GPU's errors are sticky
                    self.worker.kill()
                if raised.verdict.code is not RejectCode.CRASH:
                    return Verdict(raised.verdict)
                self.progress.note(f"{candidate.name}: {raised.verdict.reason}")
                continue
            if verdict.rejected is not None and verdict.rejected.code in _TAINTING:
                self.worker.kill()
            return verdict
        assert failure is not None
        return Verdict(Rejected(RejectCode.CRASH, f"{MAX_CRASHES} times, so quarantined: {failure.verdict.reason}"))

    def _load(self) -> None:
        if self.worker.alive and self.worker.pid == self._loaded_in:
            return
        load_problem(self.worker, self.recipe, self.key)
        self._loaded_in = self.worker.pid

    def _attempt(self, candidate: Candidate) -> Verdict:
        limits = self.worker.limits
        bind_candidate(self.worker, candidate)
        hopeless_s = None if self._best is None else self.screen.abandon_ratio * self._best
        called = self.worker.request(
            "first_call",
            limits.call,
            name=candidate.name,
            calls=self.screen.abandon_calls,
            enough_s=hopeless_s,
        )
        first_s = min(called["seconds"])
        if candidate.name not in self.protected and hopeless_s is not None and first_s > hopeless_s:
            assert self._best is not None
            reason = (
                f"not gated: {len(called['seconds'])} calls, none under {format_seconds(first_s)}, "
                f"{first_s / self._best:.1f}x the best that is proven ({format_seconds(self._best)})"
            )
            return Verdict(Rejected(RejectCode.SLOW, reason), first_s=first_s)
        found = self.worker.request(
            "gate",
            limits.gate,
            name=candidate.name,
            seeds=[self.recipe.seed + i for i in range(self.gate.seeds)],
            max_token_heads=self.gate.max_token_heads,
        )
        if found["code"] is not None:
            return Verdict(Rejected(RejectCode(found["code"]), found["reason"]), peak_bytes=found["peak_bytes"])
        tags = ("conformant", "repeatable") if found["repeatable"] else ("conformant",)
        return Verdict(None, tags, first_s, found["peak_bytes"])


def load_problem(worker: Worker, recipe: ProblemRecipe, key: dict[str, Any]) -> None:
    """Build the problem in ``worker``. Raises: WorkerError if that fails or gives another problem."""
    try:
        loaded = worker.request("load", worker.limits.load, problem=recipe.to_dict())
    except CandidateFailure as failure:
        raise WorkerError(f"the inputs of {recipe.case.name!r} cannot be made: {failure.verdict.reason}") from failure
    if loaded["key"] != key:
        unlike = sorted(name for name in key if loaded["key"].get(name) != key[name])
        raise WorkerError(f"{recipe.case.name!r}: a worker builds another problem, unlike in {', '.join(unlike)}")


def bind_candidate(worker: Worker, candidate: Candidate) -> None:
    """Bind in ``worker``. Raises: CandidateFailure, also when its source changed since it was admitted."""
    bound = worker.request("bind", worker.limits.bind, **candidate.to_request())
    if bound["fingerprint"] != candidate.fingerprint:
        reason = "its source changed while tuning; run again"
        raise CandidateFailure(Rejected(RejectCode.COMPILE, reason), candidate.name)
