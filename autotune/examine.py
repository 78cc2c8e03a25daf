"""The gate's side of the tuner: every candidate is proven, in a process of its own, before anything is timed.

The worker that examines is never the one that times: a candidate that scribbled over memory, printed, or left a
broken device behind has not been anywhere near a measurement. The few calls made here tell only whom to spare the
gate, which costs many times a call: one that is hopelessly slow cannot win, right or wrong. One that is so already by
what its kernels take in graphs is not even called where they are launched eagerly. Nor are, on a GPU, settings of a
backend that is far behind by its default, or that has others which are faster in graphs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..registry.decision import RejectCode, Rejected
from .candidates import Candidate
from .policy import TunePolicy
from .progress import Progress
from .recipe import ProblemRecipe
from .resume import Resume, Verdict
from .samples import format_seconds
from .worker import CandidateFailure, Worker, WorkerError

__all__ = ["MAX_CRASHES", "Examiner", "GatePolicy", "bind_candidate", "load_problem"]

#: Deaths of the worker after which a candidate is out. One may be the machine's fault.
MAX_CRASHES = 2

#: After these the worker's memory may not be what it should be, and the next candidate must not suffer for it.
_TAINTING = frozenset({RejectCode.CRASH, RejectCode.TIMEOUT, RejectCode.CANARY, RejectCode.INPUT_MODIFIED})


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """How hard a candidate is looked at, and whom that is spared.

    Attributes:
        seeds: how many value seeds, besides the adversarial layout.
        max_token_heads: tokens times value heads that the float64 reference computes per run; beyond it a subset
            of the heads stands for all, since heads are independent.
        calls: first calls made before the gate. Their minimum counts: the first is cold, others are interrupted.
        hopeless_ratio: not gated if that minimum exceeds this times the best proven one. Twice is beyond what the
            screen forgives a median, so the gate is spared only to those the screen would drop.
        behind_ratio: on a GPU the other settings of a backend are not even called if its default takes more than this
            times the best. In 172 problems tuned without this rule, no setting gained that much on its default and won.
        settings: of each backend, how many settings are called that were not proven by graph, when the same problem is
            launched eagerly: the fastest by graph, since all cost the host the same. 1 would have done in 83 problems.
    """

    seeds: int = 2
    max_token_heads: int = 4096
    calls: int = 5
    hopeless_ratio: float = 2.0
    behind_ratio: float = 2.5
    settings: int = 3


class Examiner:
    """Examines the candidates of one problem in ``worker``.

    Args:
        key: the problem's key; the worker must arrive at the same one from the recipe.
        protected: candidates that are gated even if they are hopelessly slow.

    Attributes:
        least_s: of candidates that were called here in graphs, seconds that an eager call takes at least.
    """

    def __init__(
        self,
        worker: Worker,
        recipe: ProblemRecipe,
        key: dict[str, Any],
        gate: GatePolicy,
        policy: TunePolicy,
        resume: Resume,
        progress: Progress,
        protected: Iterable[str] = (),
    ) -> None:
        self.worker = worker
        self.recipe = recipe
        self.key = key
        self.gate = gate
        self.screen = policy.screen
        self.measure = replace(policy.measure, mode=recipe.mode)
        self.resume = resume
        self.progress = progress
        self.protected = frozenset(protected)
        self.least_s: dict[str, float] = {}
        self._loaded_in: int | None = None
        self._bound: set[str] = set()

    def examine(
        self,
        candidates: Sequence[Candidate],
        proven: Mapping[str, Verdict] | None = None,
        least_s: Mapping[str, float] | None = None,
        by_graph: Mapping[str, float] | None = None,
    ) -> dict[str, Verdict]:
        """A verdict on each, remembered one by one, so that none is made twice.

        Args:
            proven: verdicts of the gate on some of them, from another launch mode: they are called, since their times
                are others here and the rest is measured by them, and not gated again.
            least_s: seconds that a call of some takes at least, as found in another launch mode.
            by_graph: seconds of first calls by graph, where these are launched eagerly; inf if it was too slow to be
                called there.

        Raises:
            WorkerError: no worker can be had, or the problem cannot be built.
        """
        proven, least_s = proven or {}, least_s or {}
        outranked = self._outranked(candidates, proven, by_graph or {})
        defaults = {c.backend: c.name for c in reversed(candidates)}
        fastest: dict[str, float] = {}  # of each backend
        self.progress.stage("first calls", len(candidates))
        verdicts: dict[str, Verdict] = {}
        called: dict[str, float] = {}

        def turn(candidate: Candidate) -> tuple[bool, ...]:
            """Those that are proven first, then each backend's default: the best of them spares calls to others."""
            name = candidate.name
            return name not in proven, name not in self.protected, name != defaults[candidate.backend]

        for candidate in sorted(candidates, key=turn):
            name = candidate.name
            known = self.resume.verdict(candidate) or self._too_slow(candidate, least_s, _times(verdicts))
            if known is None and name not in proven:
                known = outranked.get(name) or self._behind(candidate, fastest)
            known = known or self._called(candidate, called)
            if known is None and name in proven:
                known = replace(proven[name], first_s=called[name])
            seconds = called.get(name) or (known.first_s if known else None) or least_s.get(name)
            if seconds is not None:
                fastest[candidate.backend] = min(seconds, fastest.get(candidate.backend, seconds))
            if known is not None:
                verdicts[candidate.name] = self._settled(candidate, known)
            else:
                self.progress.advance(f"{candidate.name}: {format_seconds(called[candidate.name])}")
        # The fastest first: what is proven early spares the gate to more of the others.
        waiting = [c for c in candidates if c.name not in verdicts]
        self.progress.stage("gate", len(waiting))
        for candidate in sorted(waiting, key=lambda c: (c.name not in self.protected, called[c.name])):
            verdict = self._spared(candidate, called[candidate.name], _times(verdicts))
            if verdict is None:
                verdict = self._survived(candidate, lambda c: self._gated(c, called[c.name]))
            verdicts[candidate.name] = self._settled(candidate, verdict)
        if self._loaded_in is not None and self.worker.alive and self.worker.pid == self._loaded_in:
            self.worker.request("unload", self.worker.limits.load)
        return verdicts

    def _settled(self, candidate: Candidate, verdict: Verdict) -> Verdict:
        if self.resume.verdict(candidate) is None:
            self.resume.remember(candidate, verdict)
        outcome = "proven" if verdict.rejected is None else verdict.rejected.code.value
        self.progress.advance(f"{candidate.name}: {outcome}")
        return verdict

    def _called(self, candidate: Candidate, called: dict[str, float]) -> Verdict | None:
        """Make the first calls, and note their minimum in ``called``; a verdict if that fails."""

        def first_calls(candidate: Candidate) -> Verdict:
            best = min(called.values(), default=None)
            how = {"calls": self.gate.calls, "policy": asdict(self.measure), "best_s": best}
            found = self._request("first_call", candidate, **how)
            if found.get("least_s") is not None:
                self.least_s[candidate.name] = found["least_s"]
            return Verdict(None, first_s=min(found["seconds"]))

        verdict = self._survived(candidate, first_calls)
        if verdict.rejected is not None or verdict.first_s is None:
            return verdict
        called[candidate.name] = verdict.first_s
        return None

    def _too_slow(self, candidate: Candidate, least_s: Mapping[str, float], proven: Sequence[float]) -> Verdict | None:
        """The verdict that makes even calls needless, given the first calls of those proven so far, fastest first."""
        seconds = least_s.get(candidate.name)
        if seconds is None or candidate.name in self.protected or not proven:
            return None
        if seconds <= self.gate.hopeless_ratio * proven[0]:
            return None
        text = (
            f"not called: in graphs it takes {format_seconds(seconds)} at least, {seconds / proven[0]:.1f}x the best "
            f"that is proven ({format_seconds(proven[0])})"
        )
        return Verdict(Rejected(RejectCode.SLOW, text))

    def _behind(self, candidate: Candidate, fastest: Mapping[str, float]) -> Verdict | None:
        """The verdict on a setting whose backend is far behind; ``fastest``: seconds of each backend's best so far."""
        seconds = fastest.get(candidate.backend)
        if seconds is None or candidate.name in self.protected or self.recipe.device == "cpu":
            return None
        best = min(fastest.values())
        if seconds <= self.gate.behind_ratio * best:
            return None
        text = (
            f"not called: with other settings {candidate.backend} takes {format_seconds(seconds)}, "
            f"{seconds / best:.1f}x the best of all ({format_seconds(best)})"
        )
        return Verdict(Rejected(RejectCode.SLOW, text))

    def _outranked(
        self, candidates: Sequence[Candidate], proven: Mapping[str, Verdict], by_graph: Mapping[str, float]
    ) -> dict[str, Verdict]:
        """Verdicts on settings that need no call here, since by graph enough others of their backends are faster."""
        verdicts: dict[str, Verdict] = {}
        ahead: Counter[str] = Counter()
        for candidate in sorted(candidates, key=lambda c: by_graph.get(c.name, 0.0)):
            seconds = by_graph.get(candidate.name)
            if seconds is None or candidate.name in {*proven, *self.protected}:
                continue
            if math.isinf(seconds):
                text = "not called: in graphs it was too slow to be"
            elif ahead[candidate.backend] >= self.gate.settings:
                most = self.gate.settings
                text = f"not called: in graphs it takes {format_seconds(seconds)}, and {most} other settings less"
            else:
                ahead[candidate.backend] += 1
                continue
            verdicts[candidate.name] = Verdict(Rejected(RejectCode.SLOW, text))
        return verdicts

    def _spared(self, candidate: Candidate, first_s: float, proven: Sequence[float]) -> Verdict | None:
        """The verdict that makes the gate needless, given the first calls of those proven so far, fastest first."""
        if candidate.name in self.protected or not proven:
            return None
        text = f"not gated: first calls take {format_seconds(first_s)}"
        if first_s > self.gate.hopeless_ratio * proven[0]:
            text += f", {first_s / proven[0]:.1f}x the best that is proven ({format_seconds(proven[0])})"
        elif sum(s <= first_s for s in proven) > self.screen.keep:
            text += f", and {self.screen.keep} faster ones are proven already"
        else:
            return None
        return Verdict(Rejected(RejectCode.SLOW, text), first_s=first_s)

    def _gated(self, candidate: Candidate, first_s: float) -> Verdict:
        seeds = [self.recipe.seed + i for i in range(self.gate.seeds)]
        found = self._request("gate", candidate, seeds=seeds, max_token_heads=self.gate.max_token_heads)
        if found["code"] is not None:
            return Verdict(Rejected(RejectCode(found["code"]), found["reason"]), peak_bytes=found["peak_bytes"])
        tags = ("conformant", "repeatable") if found["repeatable"] else ("conformant",)
        return Verdict(None, tags, first_s, found["peak_bytes"])

    def _survived(self, candidate: Candidate, attempt: Callable[[Candidate], Verdict]) -> Verdict:
        """``attempt``, made again after a first crash; what fails otherwise is a verdict at once."""
        verdict: Verdict | None = None
        for _ in range(MAX_CRASHES):
            try:
                verdict = attempt(candidate)
            except CandidateFailure as failure:
                verdict = Verdict(failure.verdict)
            code = None if verdict.rejected is None else verdict.rejected.code
            # A GPU's errors are sticky: whatever is asked next fails as well.
            if code in _TAINTING or (code is RejectCode.RAISED and self.recipe.device != "cpu"):
                self.worker.kill()
            if verdict.rejected is None or code is not RejectCode.CRASH:
                return verdict
            self.progress.note(f"{candidate.name}: {verdict.rejected.reason}")
        assert verdict is not None
        assert verdict.rejected is not None
        reason = f"{MAX_CRASHES} times, so quarantined: {verdict.rejected.reason}"
        return replace(verdict, rejected=Rejected(RejectCode.CRASH, reason))

    def _request(self, do: str, candidate: Candidate, **arguments: Any) -> dict[str, Any]:
        """``do`` in a worker that has the problem loaded and the candidate bound."""
        limits = self.worker.limits
        if not (self.worker.alive and self.worker.pid == self._loaded_in):
            load_problem(self.worker, self.recipe, self.key)
            self._loaded_in = self.worker.pid
            self._bound.clear()
        if candidate.name not in self._bound:
            bind_candidate(self.worker, candidate)
            self._bound.add(candidate.name)
        limit = limits.gate if do == "gate" else limits.call
        return self.worker.request(do, limit, name=candidate.name, **arguments)


def _times(verdicts: Mapping[str, Verdict]) -> list[float]:
    """First calls of the proven, fastest first."""
    return sorted(v.first_s for v in verdicts.values() if v.proven and v.first_s is not None)


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
