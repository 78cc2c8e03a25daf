"""Warm-up: plan, then tune, every problem a server of one model, or of several, will meet.

    plan = plan_warmup("qwen3-next-80b-a3b", tp=4)
    report = run_warmup(plan)

A second run finds everything in the store and starts no worker. An interrupted one goes on where it stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from .. import registry as registry_package
from ..cache.entry import Entry
from ..cache.environment import Environment
from ..cache.silicon import CudaSilicon, ask_ahead
from ..cache.store import Store
from ..errors import ArgumentValueError, IsokernError
from ..registry.accuracy import DEFAULT, Accuracy, require
from ..registry.core import Registry
from ..registry.ops.fused_sigmoid_gating.catalogue import Model, catalogue, model
from ..registry.ops.fused_sigmoid_gating.concrete import adversarial_twin, concrete
from ..registry.ops.fused_sigmoid_gating.describe import describe
from ..registry.ops.fused_sigmoid_gating.workload_case import Case, Policy, Tier
from ..registry.ops.fused_sigmoid_gating.workloads import of_tier, serving_cases
from .candidates import admit
from .compiling import Compilers, compilations
from .cost import CostModel, compile_seconds, start_seconds, warmup_seconds
from .device_lock import device_lock
from .progress import Progress
from .prove import Proof, prove
from .recipe import ProblemRecipe
from .tuner import NothingProvenError, Settings, Shared, Task, Workers, default_settings, known, tune_problem
from .turns import Waiting, in_turn, ordered
from .worker import CandidateFailure, Worker

__all__ = [
    "Interrupted",
    "PlannedProblem",
    "ProblemReport",
    "WarmupPlan",
    "WarmupReport",
    "plan_shards",
    "plan_warmup",
    "run_warmup",
    "shards_of",
]

OP = "fused_sigmoid_gating"
HOOKS = "isokern.registry.ops.fused_sigmoid_gating.timing"


class Interrupted(IsokernError):
    """SIGINT or SIGTERM ended a warm-up. What was done is kept; the next run goes on. Attribute: ``signal``."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"interrupted by {self.signal.name}; run again to go on from here")


@dataclass(frozen=True, slots=True)
class PlannedProblem:
    """One problem of a plan.

    Attributes:
        task: what to tune. cases: names of the workload cases it stands for, its representative first.
        candidates: how many (backend, config) pairs are admitted; declined: how many backends are not.
        entry: the store's entry, if it needs no tuning. estimate_s: seconds it will take; 0 if known.
    """

    task: Task
    cases: tuple[str, ...]
    candidates: int
    declined: int
    entry: Entry | None
    estimate_s: float

    @property
    def known(self) -> bool:
        return self.entry is not None


@dataclass(frozen=True, slots=True)
class WarmupPlan:
    """What a warm-up will do.

    Attributes:
        shards: whose layers, as models of the catalogue and tensor-parallel sizes. device: where.
        threads: torch's intra-op threads (part of the environment).
        problems: in the order of the workload. environment: what the results will hold for.
        registry, store: where candidates come from and results go. settings: how to tune.
        estimate: where the time estimate comes from, in words. compile_s: of it, until all kernels are compiled;
            start_s: until the workers are ready.
    """

    shards: tuple[tuple[str, int], ...]
    device: str
    threads: int
    problems: tuple[PlannedProblem, ...]
    environment: Environment
    registry: Registry
    store: Store
    settings: Settings
    estimate: str
    compile_s: float = 0.0
    start_s: float = 0.0

    @property
    def title(self) -> str:
        """Whose layers, for people."""
        models, sizes = self.models, sorted({tp for _, tp in self.shards})
        who = models[0] if len(models) == 1 else f"{len(models)} models"
        return f"{who}, TP {', '.join(map(str, sizes))}"

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.shards))

    @property
    def arguments(self) -> str:
        """What ``isokern warmup`` is told for these."""
        sizes = dict.fromkeys(tp for _, tp in self.shards)
        return " ".join([*(f"--model {name}" for name in self.models), *(f"--tp {tp}" for tp in sizes)])

    @property
    def estimate_s(self) -> float:
        """Seconds for all problems that are not known, the proof included."""
        todo = [p for p in self.problems if not p.known]
        graph = [p.estimate_s for p in todo if p.task.recipe.mode == "graph"]
        others = [p.estimate_s for p in todo if p.task.recipe.mode != "graph"]
        return warmup_seconds(graph, others, self.start_s, self.compile_s)

    @property
    def store_path(self) -> Path | None:
        """Directory that the entries are written to; None if no layer is writable."""
        layer = self.store.writable_layer
        return None if layer is None else layer.schema_root / self.environment.hash


@dataclass(frozen=True, slots=True)
class ProblemReport:
    """One problem's result.

    Attributes:
        planned: the plan's line. entry: the result; None if there is none. seconds: wall time, 0 if it was known.
        error: why there is no result; "" otherwise. proof: what a fresh process dispatched; None if not asked.
    """

    planned: PlannedProblem
    entry: Entry | None
    seconds: float
    error: str = ""
    proof: Proof | None = None

    @property
    def was_known(self) -> bool:
        return self.planned.known

    @property
    def rejected(self) -> Counter[str]:
        """Candidates by rejection code."""
        if self.entry is None:
            return Counter()
        return Counter(c.code for c in self.entry.candidates if c.code is not None)


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What a warm-up did.

    Attributes:
        plan: what was asked. problems: a report for each that was reached, in order.
        skipped: problems the budget did not reach. seconds: wall time in all. workers: processes started.
    """

    plan: WarmupPlan
    problems: tuple[ProblemReport, ...]
    skipped: tuple[PlannedProblem, ...]
    seconds: float
    workers: int

    @property
    def ok(self) -> bool:
        """Every problem reached has a winner, and a fresh process dispatches it."""
        return all(p.entry is not None and (p.proof is None or p.proof.ok) for p in self.problems)

    @property
    def errors(self) -> tuple[str, ...]:
        """A line per problem without a result or with a failed proof."""
        lines = []
        for p in self.problems:
            if p.error:
                lines.append(f"{p.planned.cases[0]}: {p.error}")
            elif p.proof is not None and not p.proof.ok:
                lines.append(f"{p.planned.cases[0]}: a fresh process {p.proof.error}")
        return tuple(lines)


def shards_of(models: Sequence[str], sizes: Sequence[int]) -> tuple[tuple[Model, int], ...]:
    """Models by name, ``all`` for the whole catalogue, each at those of the tensor-parallel sizes that it has.

    Raises:
        UnknownNameError: no such model. CatalogueError: one has none of the sizes; the only one not each of them.
    """
    named = tuple(catalogue().values()) if "all" in models else tuple(dict.fromkeys(map(model, models)))
    found: list[tuple[Model, int]] = []
    for one in named:
        able = [tp for tp in dict.fromkeys(sizes) if tp in one.tensor_parallel]
        if not able or (len(named) == 1 and len(able) < len(set(sizes))):
            one.shard(next(tp for tp in sizes if tp not in one.tensor_parallel))  # says what is wrong
        found += [(one, tp) for tp in able]
    return tuple(found)


def plan_warmup(
    model_name: str | Model,
    tp: int = 1,
    cases: Sequence[Case] | None = None,
    device: str = "cpu",
    *,
    tier: Tier | None = None,
    policies: Sequence[Policy] | None = None,
    accuracy: Accuracy = DEFAULT,
    store: Store | None = None,
    registry: Registry | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> WarmupPlan:
    """The problems of one model, as :func:`plan_shards`.

    Raises: as that; UnknownNameError: no such model; CatalogueError: it does not split ``tp`` ways.
    """
    ask_ahead(device)  # while the catalogue is read
    found = model(model_name) if isinstance(model_name, str) else model_name
    return plan_shards(
        [(found, tp)], cases, device, tier=tier, policies=policies, accuracy=accuracy, store=store, registry=registry,
        settings=settings, seed=seed,
    )  # fmt: skip


def plan_shards(
    shards: Sequence[tuple[Model, int]],
    cases: Sequence[Case] | None = None,
    device: str = "cpu",
    *,
    tier: Tier | None = None,
    policies: Sequence[Policy] | None = None,
    accuracy: Accuracy = DEFAULT,
    store: Store | None = None,
    registry: Registry | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> WarmupPlan:
    """List the problems, and what is already known of each. Runs no candidate and writes nothing.

    Args:
        shards: models with tensor-parallel sizes; a problem that several have is tuned once.
        cases: the workload; None takes each model's serving cases. tier: how much of it; None: all of ``cases``, of the
            models' own ``core`` on a CPU and ``wide`` on a GPU. device: ``cpu``, ``cuda`` or ``auto``
            (a GPU if there is one). policies: launch modes of the cases that name none; None: all that the device
            has, since they rank candidates differently. accuracy: the policy of the cases that name none; under
            ``rounded`` backends of every class are candidates. store: None takes the registry's.

    Raises:
        CatalogueError: a model does not split that many ways.
        ArgumentValueError: another device, or policy, or a tier that none of ``cases`` is in.
        PredicateError: a backend's predicate has a bug.
    """
    ask_ahead(device)  # while torch is imported
    registry = registry or registry_package.default
    store = store or registry.store
    device = _device(device)
    require("accuracy", accuracy)
    split = [(found, found.shard(tp)) for found, tp in shards]
    environment = registry.environment(device)
    settings = settings or default_settings(device)
    modes = tuple(policies or ((Policy.EAGER,) if environment.device == "cpu" else tuple(Policy)))
    alike: dict[frozenset[tuple[str, Any]], list[tuple[str, Task]]] = {}  # cases by name, those of one key together
    for found, shard in split:
        if cases is None:
            chosen = serving_cases(found, tier or (Tier.CORE if environment.device == "cpu" else Tier.WIDE))
        else:
            chosen = of_tier(cases, tier or Tier.FULL)
        for case in chosen:
            spec = concrete(shard, case, seed)
            for policy in modes if case.policy is None else (case.policy,):
                if policy is Policy.GRAPH and environment.device == "cpu":
                    raise ArgumentValueError("policy", "eager on a CPU, which has no graphs", f"graph ({case.name})")
                mode: Literal["eager", "graph"] = "graph" if policy is Policy.GRAPH else "eager"
                under = case.accuracy or accuracy
                recipe = ProblemRecipe(OP, spec, adversarial_twin(spec, seed + 1), HOOKS, seed, device, mode, under)
                task = Task(recipe, describe(spec, environment.device, arch_of(environment), mode, under))
                name = spec.name if len(split) == 1 else f"{shard.model} TP {shard.tp} {spec.name}"
                alike.setdefault(frozenset(task.key.items()), []).append((name, task))
    if cases is not None and not alike:
        given = f"{tier or Tier.FULL}; the cases' are {', '.join(sorted({c.tier for c in cases})) or 'none'}"
        raise ArgumentValueError("tier", "one that a case of the workload is in", given)
    listed = []
    for shared in alike.values():
        # One tuning serves all problems of a key; the largest stands for them, as that is where time is lost.
        shared.sort(key=lambda named: -named[1].recipe.case.tokens)
        names, task = tuple(name for name, _ in shared), shared[0][1]
        admission = admit(registry, OP, task.problem)
        listed.append((names, task, admission, known(registry, store, environment, task, admission)))
    model_of_cost = CostModel.calibrated(environment.device, [(task, hit.entry) for _, task, _, hit in listed if hit])
    by_graph = {task.recipe.values for _, task, _, hit in listed if task.recipe.mode == "graph" and hit is None}
    problems = tuple(
        PlannedProblem(
            task,
            names,
            len(admission.candidates),
            len(admission.declined),
            hit.entry if hit else None,
            0.0 if hit else model_of_cost.seconds(task, len(admission.candidates), _second(task, by_graph)),
        )
        for names, task, admission, hit in listed
    )
    fields = [(task, admission.candidates) for _, task, admission, hit in listed if hit is None]
    threads = environment.threads or 1
    return WarmupPlan(
        tuple((found.name, shard.tp) for found, shard in split),
        device,
        threads,
        problems,
        environment,
        registry,
        store,
        settings,
        model_of_cost.source,
        0.0 if environment.device == "cpu" else compile_seconds(compilations(fields)),
        start_seconds(environment.device),
    )


def _second(task: Task, by_graph: Container[str]) -> bool:
    """Whether the same problem is tuned by graph before."""
    return task.recipe.mode != "graph" and task.recipe.values in by_graph


def _device(name: str) -> str:
    if name == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ArgumentValueError("device", "'cpu', 'cuda' or 'auto'", repr(name))
    return name


def arch_of(environment: Environment) -> int:
    """Compute capability times ten; 0 on a CPU."""
    silicon = environment.silicon
    return int(silicon.capability.replace(".", "")) if isinstance(silicon, CudaSilicon) else 0


def run_warmup(
    plan: WarmupPlan,
    progress: Progress | None = None,
    *,
    budget_s: float | None = None,
    check: bool = True,
    compilers: int | None = None,
) -> WarmupReport:
    """Tune what is not known, publish each result as soon as there is one, and prove them in a fresh process.

    Args:
        budget_s: start no further problem after so many seconds. check: False leaves the proof out.
        compilers: processes that compile ahead on a GPU; None: as many as there are processors for; 0: none, each
            candidate is compiled when its turn comes.

    Raises:
        Interrupted: on SIGINT or SIGTERM (in the main thread), after the workers are gone.
        WorkerError: worker processes cannot be had at all.
    """
    progress = progress or Progress()
    began = time.monotonic()
    reports: list[ProblemReport] = []
    skipped: list[PlannedProblem] = []
    todo = sum(not p.known for p in plan.problems)
    workers = Workers(plan.device, plan.threads, plan.settings.limits)
    prover = Worker(plan.device, plan.threads, plan.settings.limits)
    try:
        with interruptible(), Compilers(compilers, plan.settings.limits) as crew, workers:
            found: dict[int, ProblemReport] = {}
            shared = Shared()
            waiting = [Waiting.of(plan.registry, planned) for planned in ordered(plan, budget_s is None)]
            if plan.environment.device != "cpu" and waiting:
                _begin(plan, waiting, crew, workers, progress)
                if check:
                    prover.begin()  # loading takes longer than all the proofs
            for planned in in_turn(waiting, crew, progress):
                if budget_s is not None and time.monotonic() - began >= budget_s:
                    break
                progress.begin(planned.cases[0], len(found), todo)
                with device_lock(plan.device, progress.note):
                    plan.store.refresh()  # whoever held the lock before may have tuned this very problem
                    found[id(planned)] = _tune(plan, planned, workers, progress, shared)
            for planned in plan.problems:
                if planned.entry is not None:
                    reports.append(ProblemReport(planned, planned.entry, 0.0))
                elif id(planned) in found:
                    reports.append(found[id(planned)])
                else:
                    skipped.append(planned)
            if check:
                crew.close()
                workers.close()
                reports = _proven(plan, reports, prover)
    finally:
        # Even a signal that comes while workers are being closed must not leave one behind.
        prover.kill()
        workers.close()
    spawned = workers.spawned + prover.spawned
    return WarmupReport(plan, tuple(reports), tuple(skipped), time.monotonic() - began, spawned)


def _begin(plan: WarmupPlan, waiting: Sequence[Waiting], crew: Compilers, workers: Workers, progress: Progress) -> None:
    """Set compilers and workers off; the compilers in the order of the problems."""
    fields = [one.field for one in waiting]
    if crew.jobs:
        crew.submit(compilations(fields))
    backends = plan.registry.backends(OP)
    needed = {candidate.backend for _, candidates in fields for candidate in candidates}
    least = min((task.recipe for task, _ in fields), key=lambda recipe: recipe.case.tokens)
    try:
        workers.start(sorted({module for name in needed for module in backends[name].requires}), least)
    except CandidateFailure as failure:
        progress.note(f"the rehearsal failed, and so may the gate: {failure}")


def _tune(
    plan: WarmupPlan, planned: PlannedProblem, workers: Workers, progress: Progress, shared: Shared
) -> ProblemReport:
    began = time.monotonic()
    entry, error = None, ""
    try:
        entry = tune_problem(
            planned.task,
            registry=plan.registry,
            store=plan.store,
            environment=plan.environment,
            workers=workers,
            settings=plan.settings,
            progress=progress,
            shared=shared,
        )
    except NothingProvenError as nothing:
        error = str(nothing)
    seconds = time.monotonic() - began
    progress.end(planned.cases[0], entry.label if entry else error.partition("\n")[0], seconds)
    return ProblemReport(planned, entry, seconds, error)


def _proven(plan: WarmupPlan, reports: Iterable[ProblemReport], prover: Worker) -> list[ProblemReport]:
    """Proofs for what this run published; entries found in the store were proven when they were made."""
    reports = list(reports)
    fresh = [(r.planned.task.recipe, r.entry) for r in reports if r.entry is not None and not r.was_known]
    if not fresh:
        return reports
    plan.registry.refresh()  # this process, too, shall dispatch what it tuned
    proofs = iter(prove(plan.store, plan.registry, fresh, worker=prover))
    return [
        ProblemReport(r.planned, r.entry, r.seconds, r.error, next(proofs))
        if r.entry is not None and not r.was_known
        else r
        for r in reports
    ]


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted here; the handlers there were are put back. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
