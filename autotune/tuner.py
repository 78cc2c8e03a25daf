"""One problem, from admission to the published entry."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from .. import __version__
from ..cache.candidate import CandidateRecord
from ..cache.codec import digest
from ..cache.entry import Entry, key_hash
from ..cache.environment import Environment
from ..cache.found import Hit
from ..cache.journal import Journal
from ..cache.store import Store
from ..errors import IsokernError
from ..registry.core import Registry
from ..registry.decision import RejectCode
from .candidates import PREDICATE_CODES, Admission, Candidate, admit
from .contest import Contest, Standing
from .examine import Examiner, GatePolicy
from .policy import MeasurePolicy, RacePolicy, TunePolicy
from .progress import Progress
from .publish import Findings, make_entry
from .recipe import ProblemRecipe
from .resume import Resume, Verdict, field_digest
from .select import select
from .worker import Limits, Worker

__all__ = ["NothingProvenError", "Settings", "Shared", "Task", "Workers", "default_settings", "known", "tune_problem"]

#: Verdicts that say as much about the machine on that day as about the candidate: never carried over.
_SITUATIONAL = frozenset({RejectCode.TIMEOUT.value, RejectCode.MEMORY.value, RejectCode.CRASH.value})


class NothingProvenError(IsokernError, RuntimeError):
    """No candidate passed the gate: nothing can be published. ``rejections``: (candidate, code, reason)."""

    def __init__(self, problem: str, rejections: Sequence[tuple[str, str, str]]) -> None:
        self.rejections = tuple(rejections)
        lines = "".join(f"\n  {name}: [{code}] {reason}" for name, code, reason in self.rejections)
        super().__init__(f"no candidate is proven for {problem}:{lines or ' no backend accepts it'}")


@dataclass(frozen=True, slots=True)
class Shared:
    """What the tunings of one run tell one another of a candidate: a launch mode changes times, no values.

    Each by (values of a problem, candidate, fingerprint).

    Attributes:
        proven: verdicts of the gate.
        least_s: seconds that an eager call takes at least, from graphs of such calls.
        by_graph: seconds of the first calls by graph; inf of one that was too slow to be called.
    """

    proven: dict[tuple[str, str, str], Verdict] = field(default_factory=dict)
    least_s: dict[tuple[str, str, str], float] = field(default_factory=dict)
    by_graph: dict[tuple[str, str, str], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to tune: thresholds of the decisions, the gate's effort, the workers' time limits."""

    policy: TunePolicy = field(default_factory=TunePolicy)
    gate: GatePolicy = field(default_factory=GatePolicy)
    limits: Limits = field(default_factory=Limits)


def default_settings(device: str) -> Settings:
    """The settings for ``device``.

    On a CPU samples last a millisecond, since the scheduler's ticks and its other tenants are of that size; and a
    sentinel that moves by less than a fifth is everyday business of a shared memory bus. The paired differences
    still see each candidate under the same conditions.
    """
    if device != "cpu":
        return Settings()
    return Settings(
        TunePolicy(
            race=RacePolicy(rounds=(5, 10, 20), sentinel_drift=0.2, max_discarded=15, wall_cap_s=8.0),
            measure=MeasurePolicy(min_sample_us=1000.0),
        )
    )


@dataclass(frozen=True, slots=True)
class Task:
    """A problem to tune: its description, and the recipe for making it."""

    recipe: ProblemRecipe
    problem: Any

    @property
    def key(self) -> dict[str, Any]:
        """What the result is stored under."""
        key: dict[str, Any] = self.problem.tuning_key()
        return key


class Workers:
    """The two processes of one device: one examines, one times; neither starts before it is needed.

    Never both busy. Their lives span problems, so that a second problem finds warm imports and compilers.
    """

    def __init__(self, device: str, threads: int, limits: Limits | None = None) -> None:
        self.examiner = Worker(device, threads, limits)
        self.timer = Worker(device, threads, limits)

    def start(self, modules: Sequence[str], rehearsal: ProblemRecipe | None = None) -> None:
        """Start both at the same time, and have them load what they will need; else they do so when it is their turn.

        Args:
            modules: to import. rehearsal: a problem for the one that examines to go through the gate with.

        Raises:
            WorkerError: one does not start. CandidateFailure: the rehearsal fails.
        """
        for worker in (self.examiner, self.timer):
            worker.begin()
        for worker in (self.examiner, self.timer):
            worker.request("import", worker.limits.boot, modules=list(modules))
        if rehearsal is not None:
            self.examiner.request("rehearse", self.examiner.limits.gate, problem=rehearsal.to_dict())

    @property
    def spawned(self) -> int:
        """Processes started so far."""
        return self.examiner.spawned + self.timer.spawned

    def close(self) -> None:
        """End both. Idempotent."""
        self.examiner.kill()
        self.timer.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def known(registry: Registry, store: Store, environment: Environment, task: Task, admission: Admission) -> Hit | None:
    """The store's answer, if tuning again could not change it: no backend is new, changed, or newly able."""
    op = task.recipe.op
    found = store.get(op, registry.contract_version(op), task.key, environment, admission.fingerprints)
    if not isinstance(found, Hit) or found.stale:
        return None
    tried = {c.backend for c in found.entry.candidates if c.code not in PREDICATE_CODES}
    return found if {c.backend for c in admission.candidates} <= tried else None


def tune_problem(
    task: Task,
    *,
    registry: Registry,
    store: Store,
    environment: Environment,
    workers: Workers,
    settings: Settings | None = None,
    progress: Progress | None = None,
    shared: Shared | None = None,
) -> Entry:
    """Tune ``task`` and publish the result; from the store if it is known.

    A run that was killed goes on from its journal, which keeps every verdict, screen pass and race block.

    Args:
        shared: between the tunings of one run, so that a candidate is gated once for both launch modes.

    Raises:
        NothingProvenError: every candidate was rejected; the reasons are in it (and in the journal).
        WorkerError: no worker process can be had. PredicateError: a backend's predicate has a bug.
    """
    settings = settings or default_settings(task.recipe.device)
    progress = progress or Progress()
    admission = admit(registry, task.recipe.op, task.problem)
    hit = known(registry, store, environment, task, admission)
    if hit is not None:
        return hit.entry
    return _Run(task, registry, store, environment, workers, settings, progress, admission, shared).run()


class _Run:
    def __init__(
        self,
        task: Task,
        registry: Registry,
        store: Store,
        environment: Environment,
        workers: Workers,
        settings: Settings,
        progress: Progress,
        admission: Admission,
        shared: Shared | None,
    ) -> None:
        self.shared = shared or Shared()
        self.task = task
        self.op = task.recipe.op
        self.version = registry.contract_version(self.op)
        self.store = store
        self.environment = environment
        self.workers = workers
        self.settings = settings
        self.progress = progress
        self.earlier = store.peek(self.op, self.version, task.key, environment)
        # What was chosen before races again, even if it is known by now to lose on such problems.
        kept = () if self.earlier is None else (self.earlier.label,)
        self.admission = admit(registry, self.op, task.problem, kept) if kept else admission
        self.resume = Resume(
            Journal(journal_path(store, environment, self.op, self.version, task.key)),
            digest([__version__, task.recipe.to_dict(), asdict(settings), self._earlier_identity()]),
        )

    @property
    def _graph(self) -> bool:
        return self.task.recipe.mode == "graph"

    def _earlier_identity(self) -> str:
        return "" if self.earlier is None else self.earlier.measured["created"]

    def run(self) -> Entry:
        began = time.monotonic()
        if self.resume.resumed:
            self.progress.note(f"resuming {self.task.recipe.case.name!r} from its journal")
        carried = self._carried()
        incumbent, default = self._incumbent(), self.admission.default
        protected = [name for name in dict.fromkeys((incumbent, default)) if name is not None]
        field = [c for c in self.admission.candidates if c.name not in carried]
        verdicts = self._examine(field, protected)
        proven = [c for c in field if verdicts[c.name].proven]
        standing = self._contest(proven, [name for name in protected if name in {c.name for c in proven}])
        if standing is None or standing.raced is None or not standing.raced.survivors:
            raise self._nothing(verdicts, standing)
        selection = select(standing.raced, incumbent=incumbent, default=default)
        findings = Findings(self.admission, verdicts, standing, carried, selection)
        spent = time.monotonic() - began
        mode = self.task.recipe.mode
        entry = make_entry(findings, self.op, self.version, self.task.key, self.environment.hash, mode, spent)
        self.store.put(entry, self.environment)
        self.resume.discard()
        return entry

    # ---- what an earlier entry still says

    def _fresh(self) -> dict[str, CandidateRecord]:
        if self.earlier is None:
            return {}
        return {c.label: c for c in self.earlier.fresh_candidates(self.admission.fingerprints)}

    def _incumbent(self) -> str | None:
        """The earlier winner, unless its kernel has changed since: then it is a new candidate like any other."""
        return self.earlier.label if self.earlier is not None and self.earlier.label in self._fresh() else None

    def _carried(self) -> dict[str, CandidateRecord]:
        """Records that go into the new entry as they are.

        Samples of another session do not pair with those of this one, so whoever may win races again: new and
        changed candidates, the earlier winner, its unbeaten rivals, the default. What is carried are verdicts: a
        kernel that was wrong and has not changed is wrong; one that was slower than the earlier winner still is,
        as long as that winner is there to be compared with.
        """
        keep = {}
        for label, record in self._fresh().items():
            slow = record.code == RejectCode.SLOW.value
            if record.status == "rejected" and record.code not in _SITUATIONAL | PREDICATE_CODES:
                if slow and (self._incumbent() is None or label == self.admission.default):
                    continue
                keep[label] = record
        return keep

    def _examine(self, field: Sequence[Candidate], protected: Sequence[str]) -> dict[str, Verdict]:
        fresh = self._fresh()
        verdicts = {}
        for candidate in field:
            record = fresh.get(candidate.name)
            if record is not None and "conformant" in record.tags:  # the same kernel was proven before
                first_s = None if record.median_us is None else record.median_us * 1e-6
                verdicts[candidate.name] = Verdict(None, record.tags, first_s)
        examiner = Examiner(
            self.workers.examiner,
            self.task.recipe,
            self.task.problem.key(),
            self.settings.gate,
            self.settings.policy,
            self.resume,
            self.progress,
            protected,
        )
        unknown = [c for c in field if c.name not in verdicts]
        values = self.task.recipe.values
        there = {c.name: (values, c.name, c.fingerprint) for c in field}
        by_graph = self.shared.by_graph
        verdicts |= examiner.examine(
            unknown,
            proven={c.name: v for c in unknown if (v := self.shared.proven.get(there[c.name])) is not None},
            least_s={c.name: s for c in unknown if (s := self.shared.least_s.get(there[c.name])) is not None},
            by_graph={} if self._graph else {c.name: s for c in unknown if (s := by_graph.get(there[c.name]))},
        )
        for candidate in field:
            verdict = verdicts[candidate.name]
            if verdict.proven:
                self.shared.proven[there[candidate.name]] = verdict
            slow = verdict.rejected is not None and verdict.rejected.code is RejectCode.SLOW
            if self._graph and (verdict.proven or slow):
                by_graph[there[candidate.name]] = verdict.first_s or math.inf
        for name, seconds in examiner.least_s.items():
            self.shared.least_s[there[name]] = seconds
        return verdicts

    # ---- timing

    def _contest(self, proven: Sequence[Candidate], protected: Sequence[str]) -> Standing | None:
        if not proven:
            return None
        identity = field_digest(proven)
        contest = Contest(
            self.workers.timer,
            self.task.recipe,
            self.task.problem.key(),
            proven,
            protected,
            self.settings.policy,
            self.progress,
            self.resume.events(identity),
            self.resume.recorder(identity),
        )
        return contest.run()

    def _nothing(self, verdicts: Mapping[str, Verdict], standing: Standing | None) -> NothingProvenError:
        rejected = {name: v.rejected for name, v in verdicts.items() if v.rejected is not None}
        failed = {**rejected, **(standing.failed if standing else {})}
        lines = [(name, why.code.value, why.reason) for name, why in failed.items()]
        lines += [(c.backend, str(c.code), str(c.reason)) for c in self.admission.declined]
        return NothingProvenError(self.task.problem.label, lines)


def journal_path(store: Store, environment: Environment, op: str, version: int, key: Mapping[str, Any]) -> Path:
    """Where the unfinished run of one key is kept: beside the entries it will join, if they can be written."""
    layer = store.writable_layer
    root = layer.schema_root if layer is not None else Path(tempfile.gettempdir()) / "isokern"
    return root / environment.hash / "journal" / f"{op}-{key_hash(op, version, key)}.jsonl"
