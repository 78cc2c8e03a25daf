"""How much a choice costs against the best there is, on one problem: every candidate timed, whatever the store says.

The best is picked on one half of the blocks and compared on the other. Picked and compared on the same samples the
fastest of many would look faster than it is, and every choice would seem to have regret.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from ..errors import IsokernError
from ..registry.core import Registry
from ..registry.decision import Decision
from ..registry.ops.fused_sigmoid_gating.lengths import LengthLayout
from ..registry.varlen.classes import LengthClass
from ..registry.varlen.profile import VarlenProfile
from .candidates import Candidate, admit
from .examine import bind_candidate, load_problem
from .policy import MeasurePolicy
from .tuner import Task
from .worker import CandidateFailure, Worker

__all__ = ["NothingToCompareError", "Regret", "lengths_in_bucket", "measure_regret", "split_regret"]

#: Candidates slower than this times the best in so many first calls cannot be the best.
_HOPELESS = 2.0
_FIRST_CALLS = 5
#: A fixed kernel, timed with every block, that moved by more than this says that a neighbour was at work.
_DRIFT = 0.2
#: Times as many blocks as are asked for, at most.
_MORE = 5
_TRIES = 400


class NothingToCompareError(IsokernError, RuntimeError):
    """The choice itself could not be timed; the message says why."""


@dataclass(frozen=True, slots=True)
class Regret:
    """One choice against the best.

    Attributes:
        choice, best: ``backend[config]``. rule: what made the choice. regret: how much slower the choice is, as a
            fraction of the best's time; can be a little negative where the two are equals.
        choice_us, best_us: medians, microseconds per call. blocks: compared on. candidates: timed in each.
        times_us: of each of those, its median in microseconds per call.
    """

    choice: str
    best: str
    rule: str
    regret: float
    choice_us: float
    best_us: float
    blocks: int
    candidates: int
    times_us: Mapping[str, float]


def split_regret(blocks: Sequence[Mapping[str, float]], choice: str) -> tuple[str, float]:
    """The best candidate by the even blocks, and by how much ``choice`` is slower in the odd ones.

    Args: blocks: seconds by candidate, all of the same candidates; at least two.
    """
    picking, comparing = blocks[::2], blocks[1::2]
    if not comparing:
        raise ValueError(f"split_regret: expected two blocks or more, given {len(blocks)}")
    centre = [median(block.values()) for block in picking]
    best = min(picking[0], key=lambda name: median(b[name] / c for b, c in zip(picking, centre, strict=True)))
    return best, math.expm1(median(math.log(block[choice] / block[best]) for block in comparing))


def measure_regret(
    worker: Worker,
    task: Task,
    decision: Decision,
    registry: Registry,
    policy: MeasurePolicy,
    *,
    refused: Collection[str] = (),
    blocks: int = 10,
    spare_s: float = 0.0,
    seed: int = 0,
) -> Regret:
    """Time every admitted candidate of ``task`` in interleaved blocks and compare ``decision`` with the best.

    Args:
        worker: of the task's device. refused: labels that are known to be wrong or broken; they are not timed.
        blocks: times that each is timed, and up to ``_MORE`` times as often while the blocks take less than
            ``spare_s`` seconds: where calls are short, differences of a percent need more of them.

    Raises:
        NothingToCompareError: the choice is not among the candidates, or fails. WorkerError: the machinery fails.
    """
    admission = admit(registry, task.recipe.op, task.problem)
    config = ",".join(f"{k}={v}" for k, v in sorted(decision.config.items())) or "default"
    choice = f"{decision.backend}[{config}]"
    field = {c.name: c for c in admission.candidates if c.name == choice or c.name not in refused}
    if choice not in field:
        raise NothingToCompareError(f"{choice}, chosen by {decision.rule.value}, is no candidate of its problem")
    racing = _Racing(worker, task, field, replace(policy, mode=task.recipe.mode))
    names = racing.promising(choice)
    if choice not in names:
        raise NothingToCompareError(f"{choice}: {racing.failed[choice]}")
    order = random.Random(seed)
    rounds: list[tuple[float, dict[str, float]]] = []
    began, wanted = time.monotonic(), blocks
    while True:
        if len(rounds) >= wanted:
            if wanted < _MORE * blocks and time.monotonic() - began < spare_s:
                wanted += blocks
            elif len(rounds) >= 2 * wanted or not _restless([sentinel for sentinel, _ in rounds]):
                break
        block = racing.block(order.sample(names, len(names)))
        names = [name for name in names if name in block]
        if choice not in names:
            raise NothingToCompareError(f"{choice}: {racing.failed[choice]}")
        rounds.append((racing.sentinel_s, block))
    calm = sorted(range(len(rounds)), key=lambda i: rounds[i][0])[:wanted]
    table = [{name: rounds[i][1][name] for name in names} for i in sorted(calm)]
    best, regret = split_regret(table, choice)
    typical = {name: 1e6 * median(block[name] for block in table) for name in names}
    return Regret(
        choice, best, decision.rule.value, regret, typical[choice], typical[best], len(table[1::2]), len(names), typical
    )


def _restless(sentinels: Sequence[float]) -> bool:
    """Whether the machine was disturbed in some of the blocks: then as many again are taken, and the calmest count."""
    return max(sentinels) > (1.0 + _DRIFT) * min(sentinels)


class _Racing:
    """Candidates bound in a worker, which is made ready again if one of them breaks it."""

    def __init__(self, worker: Worker, task: Task, field: Mapping[str, Candidate], policy: MeasurePolicy) -> None:
        self.worker = worker
        self.task = task
        self.field = dict(field)
        self.policy = policy
        self.failed: dict[str, str] = {}
        self.sentinel_s = 1.0
        self._ready: set[str] | None = None
        self._benched = False

    def promising(self, choice: str) -> list[str]:
        """Who may be the best, by first calls as the tuner makes them; the choice stays whatever it takes."""
        first: dict[str, float] = {}
        limit = self.worker.limits.call
        for name in self.field:
            how = {"calls": _FIRST_CALLS, "policy": asdict(self.policy), "best_s": min(first.values(), default=None)}
            try:
                self._prepare([name])
                first[name] = min(self.worker.request("first_call", limit, name=name, **how)["seconds"])
            except CandidateFailure as failure:
                self._failed(name, failure)
        best = min(first.values(), default=0.0)
        return [name for name, seconds in first.items() if name == choice or seconds <= _HOPELESS * best]

    def block(self, names: Sequence[str]) -> dict[str, float]:
        """Seconds per call of each of ``names`` that does not fail."""
        wanted = [name for name in names if name not in self.failed]
        while wanted:
            try:
                self._prepare(wanted)
                if not self._benched:
                    self.worker.request("bench", self.worker.limits.load, policy=asdict(self.policy))
                    self._benched = True
                found = self.worker.request("time_block", self.worker.limits.call, names=wanted)
                self.sentinel_s = float(found["sentinel_s"] or 1.0)
                return {name: float(found["seconds"][name]) for name in wanted}
            except CandidateFailure as failure:
                blamed = failure.at or wanted[0]
                self._failed(blamed, failure)
                wanted.remove(blamed)
        return {}

    def _failed(self, name: str, failure: CandidateFailure) -> None:
        self.failed[name] = failure.verdict.reason
        if self.task.recipe.device != "cpu":
            self.worker.kill()  # a GPU's errors stay
        if not self.worker.alive:
            self._ready = None

    def _prepare(self, names: Sequence[str]) -> None:
        if self._ready is None or not self.worker.alive:
            load_problem(self.worker, self.task.recipe, self.task.problem.key())
            self._ready, self._benched = set(), False
        for name in names:
            if name not in self._ready:
                try:
                    bind_candidate(self.worker, self.field[name])
                except CandidateFailure as failure:
                    failure.at = name
                    raise
                self._ready.add(name)


def lengths_in_bucket(profile: VarlenProfile, seed: int) -> LengthLayout | None:
    """Random lengths that share ``profile``'s buckets and class; None if none were found.

    Not the bucket's corners only, which is where tuning was done: counts anywhere within it.
    """
    draw = random.Random(seed)
    for _ in range(_TRIES):
        n, tokens, longest = (_within(draw, bucket) for bucket in (profile.n, profile.tokens, profile.longest or 1))
        lengths = _draw(draw, profile.length_class, n, tokens, min(longest, tokens))
        if lengths and VarlenProfile.of(n, sum(lengths), max(lengths)) == profile:
            return LengthLayout.of_lengths(lengths)
    return None


def _within(draw: random.Random, bucket: int) -> int:
    return draw.randint(bucket // 2 + 1, bucket) if bucket > 1 else bucket


def _draw(draw: random.Random, length_class: LengthClass, n: int, tokens: int, longest: int) -> list[int]:
    """Lengths of about that many ``tokens``, in the spirit of the class."""
    if n == 0 or length_class is LengthClass.DECODE:
        return [1] * n
    if n == 1:
        return [longest]
    rest = max(0, tokens - longest)
    if length_class is LengthClass.HEAVY:
        weights = [draw.choice((0.0, 0.0, 0.0, 1.0)) for _ in range(n - 1)]
    else:
        weights = [
            draw.uniform(0.9, 1.0) if length_class is LengthClass.UNIFORM else draw.random() for _ in range(n - 1)
        ]
    spare = max(0, rest - (n - 1))
    total = sum(weights) or 1.0
    lengths = [min(longest, 1 + int(spare * weight / total)) for weight in weights]
    lengths.append(longest)
    draw.shuffle(lengths)
    return lengths
