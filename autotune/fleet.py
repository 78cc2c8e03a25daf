"""A warm-up on several devices at once: whoever is free takes the most valuable problem left.

    plan = plan_warmup("qwen3-next-80b-a3b", tp=4, device="cuda")
    launcher = ProcessLauncher(local_slots("cuda"), member_config(plan))
    reports = run_fleet(plan, launcher)

Devices of one kind share the work, as a choice holds for all of them. Devices of another kind, or another host with
other versions, are another environment: each environment's problems are tuned there, by its own members.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..cache.codec import InvalidRecordError
from ..cache.entry import Entry
from ..cache.environment import Environment
from .candidates import admit
from .fleet_member import MemberConfig
from .fleet_ranks import key_of
from .merge import take_over
from .progress import Progress
from .prove import Proof
from .tuner import Task, known
from .warmup import OP, PlannedProblem, ProblemReport, WarmupPlan, WarmupReport, arch_of, interruptible
from .worker import WorkerError
from .worth import Unit, units

__all__ = ["Launcher", "member_config", "plan_for", "run_fleet"]

#: A problem whose tuning ends so many members is given up: the next one would go the same way.
_MAX_LOST = 2


class Launcher(Protocol):
    """Starts members, passes requests on, and says who answered. Members are numbered from 0."""

    @property
    def names(self) -> Sequence[str]:
        """Of the members, for people."""

    def start(self) -> None:
        """Start all members."""

    def submit(self, member: int, do: str, **arguments: Any) -> None:
        """Have a member that is idle do something."""

    def wait(self) -> tuple[int, dict[str, Any]]:
        """The next answer of any member: ``result``, or ``fault``, after which it is not used again."""

    def close(self) -> None:
        """End all members. Idempotent."""


def member_config(plan: WarmupPlan, share_store: bool = True) -> MemberConfig:
    """What members of ``plan``'s fleet need to know; ``share_store``: they can reach this host's files."""
    store = plan.store if share_store else None
    device = plan.environment.device
    return MemberConfig.of(plan.registry, OP, device, plan.threads, store, plan.settings, device)


def plan_for(plan: WarmupPlan, environment: Environment) -> WarmupPlan:
    """The same workload in another environment: other backends may be admitted, other choices be known."""
    if environment.hash == plan.environment.hash:
        return plan
    problems = []
    for planned in plan.problems:
        recipe = planned.task.recipe
        problem = replace(planned.task.problem, device=environment.device, arch=arch_of(environment))
        task = Task(recipe, problem)
        admission = admit(plan.registry, recipe.op, problem)
        hit = known(plan.registry, plan.store, environment, task, admission)
        problems.append(
            replace(
                planned,
                task=task,
                candidates=len(admission.candidates),
                declined=len(admission.declined),
                entry=hit.entry if hit else None,
            )
        )
    return replace(plan, problems=tuple(problems), environment=environment)


@dataclass(slots=True)
class _Field:
    """One environment's share of the fleet; ``reports`` by the problems' keys."""

    plan: WarmupPlan
    queue: deque[Unit]
    members: set[int] = field(default_factory=set)
    reports: dict[str, ProblemReport] = field(default_factory=dict)
    lost: dict[Unit, int] = field(default_factory=dict)
    spawned: dict[int, int] = field(default_factory=dict)

    def attach(self, key: str, proof: Proof) -> None:
        if self.reports[key].entry is not None:  # else it could not be read, and the report says so
            self.reports[key] = replace(self.reports[key], proof=proof)


def run_fleet(
    plan: WarmupPlan,
    launcher: Launcher,
    progress: Progress | None = None,
    *,
    budget_s: float | None = None,
    check: bool = True,
) -> tuple[WarmupReport, ...]:
    """Tune what is not known on all of ``launcher``'s members; every result ends in ``plan``'s store.

    Args:
        budget_s: hand out no further problem after so many seconds. check: False leaves the proofs out.

    Returns: a report per environment that the members have, that of the first member first.

    Raises:
        Interrupted: on SIGINT or SIGTERM (in the main thread), after all members are gone.
        WorkerError: no member of some environment is left, and there is work for it.
    """
    try:
        with interruptible():
            return _Coordinator(plan, launcher, progress or Progress(), budget_s).run(check)
    finally:
        launcher.close()


class _Coordinator:
    def __init__(self, plan: WarmupPlan, launcher: Launcher, progress: Progress, budget_s: float | None) -> None:
        self.plan = plan
        self.launcher = launcher
        self.progress = progress
        self.budget_s = budget_s
        self.began = time.monotonic()
        self.fields: dict[str, _Field] = {}
        self.busy: dict[int, Unit] = {}
        self.gone: dict[int, str] = {}
        self.tuned_by: dict[int, list[tuple[_Field, str]]] = {}
        self.begun = 0

    def run(self, check: bool) -> tuple[WarmupReport, ...]:
        self.launcher.start()
        self._gather()
        waiting = set(range(len(self.launcher.names))) - set(self.gone)
        while True:
            for member in sorted(waiting):
                if self._hand_out(member):
                    waiting.discard(member)
            if not self.busy:
                break
            member, answer = self.launcher.wait()
            if "fault" in answer:
                self._lose(member, answer["fault"])
                waiting.discard(member)
            else:
                self._take(member, answer["result"])
                waiting.add(member)
        if check:
            self._prove()
        return tuple(self._report(one) for one in self.fields.values())

    # ---- who there is

    def _gather(self) -> None:
        """Ask every member for its environment, and list what is to do in each."""
        everyone = range(len(self.launcher.names))
        for member in everyone:
            self.launcher.submit(member, "hello")
        environments: dict[int, Environment] = {}
        while len(environments) + len(self.gone) < len(everyone):
            member, answer = self.launcher.wait()
            if "fault" in answer:
                self._lose(member, answer["fault"])
            else:
                environments[member] = Environment.from_dict(answer["result"]["environment"])
        for member in sorted(environments):
            environment = environments[member]
            if environment.hash not in self.fields:
                own = plan_for(self.plan, environment)
                self.fields[environment.hash] = _Field(own, deque(units(own.problems)))
            self.fields[environment.hash].members.add(member)
        if not self.fields:
            raise WorkerError(f"no member of the fleet starts: {self._why_gone()}")

    def _field_of(self, member: int) -> _Field:
        return next(one for one in self.fields.values() if member in one.members)

    def _why_gone(self) -> str:
        return "; ".join(f"{self.launcher.names[member]}: {why}" for member, why in sorted(self.gone.items()))

    def _lose(self, member: int, why: str) -> None:
        """A member is out: what it was at goes to another, unless that seems to be the reason."""
        self.gone[member] = why
        self.progress.note(f"{self.launcher.names[member]} is out: {why}")
        unit = self.busy.pop(member, None)
        if unit is None:
            return
        own = self._field_of(member)
        own.lost[unit] = own.lost.get(unit, 0) + 1
        if own.lost[unit] < _MAX_LOST:
            own.queue.appendleft(unit)
            return
        for planned in unit.problems:
            text = f"{own.lost[unit]} members of the fleet were lost while tuning it, the last one as {why}"
            self._done(own, planned, ProblemReport(planned, None, 0.0, text))

    # ---- work

    def _spent(self) -> bool:
        return self.budget_s is not None and time.monotonic() - self.began >= self.budget_s

    def _hand_out(self, member: int) -> bool:
        own = self._field_of(member)
        if not own.queue or self._spent():
            return False
        unit = own.queue.popleft()
        self.busy[member] = unit
        total = sum(not p.known for one in self.fields.values() for p in one.plan.problems)
        for planned in unit.problems:
            self.progress.begin(planned.cases[0], self.begun, total)
            self.begun += 1
        self.launcher.submit(member, "tune", recipes=[planned.task.recipe.to_dict() for planned in unit.problems])
        return True

    def _take(self, member: int, result: Mapping[str, Any]) -> None:
        unit, own = self.busy.pop(member), self._field_of(member)
        own.spawned[member] = result["spawned"]
        for line in result["notes"]:
            self.progress.note(f"{self.launcher.names[member]}: {line}")
        for planned, found in zip(unit.problems, result["results"], strict=True):
            entry, error = None, found["error"]
            if found["entry"] is not None:
                # Readable or not: the member will prove all that it tuned, in this order.
                self.tuned_by.setdefault(member, []).append((own, key_of(own.plan, planned)))
                try:
                    entry = Entry.from_dict(found["entry"])
                except InvalidRecordError as invalid:  # another version of isokern over there
                    error = f"{self.launcher.names[member]} sent an entry that cannot be read: {invalid}"
                else:
                    take_over(self.plan.store, [(entry, own.plan.environment)])
            self._done(own, planned, ProblemReport(planned, entry, found["seconds"], error))

    def _done(self, own: _Field, planned: PlannedProblem, report: ProblemReport) -> None:
        own.reports[key_of(own.plan, planned)] = report
        outcome = report.entry.label if report.entry else report.error.partition("\n")[0]
        self.progress.end(planned.cases[0], outcome, report.seconds)

    # ---- the end

    def _prove(self) -> None:
        """Each member proves what it tuned, where it tuned it. A proof that does not come is one that failed."""
        self.plan.registry.refresh()  # this process, too, shall dispatch what was tuned
        silent: dict[int, str] = {}
        asked = {member for member in self.tuned_by if member not in self.gone}
        for member in sorted(asked):
            self.launcher.submit(member, "prove")
        while asked:
            member, answer = self.launcher.wait()
            asked.discard(member)
            if "fault" in answer:
                self._lose(member, answer["fault"])
                continue
            tuned, proofs = self.tuned_by[member], answer["result"]["proofs"]
            if len(proofs) != len(tuned):  # whose each is cannot be told
                name = self.launcher.names[member]
                silent[member] = f"may dispatch anything: {name} sent {len(proofs)} proofs for {len(tuned)} problems"
                continue
            for (own, key), record in zip(tuned, proofs, strict=True):
                own.attach(key, Proof(**record))
        silent |= {member: f"was not asked: {why}" for member, why in self.gone.items()}
        for member in self.tuned_by.keys() & silent.keys():
            for own, key in self.tuned_by[member]:
                own.attach(key, Proof("", "", "", "", silent[member]))

    def _report(self, own: _Field) -> WarmupReport:
        if own.queue and not self._spent():
            raise WorkerError(f"no member is left for {len(own.queue)} problems: {self._why_gone()}")
        reports, skipped = [], []
        for planned in own.plan.problems:
            if planned.entry is not None:
                reports.append(ProblemReport(planned, planned.entry, 0.0))
            elif (report := own.reports.get(key_of(own.plan, planned))) is not None:
                reports.append(report)
            else:
                skipped.append(planned)
        # Each member is a process, and has its workers.
        processes = len(own.members) + sum(own.spawned.values())
        return WarmupReport(own.plan, tuple(reports), tuple(skipped), time.monotonic() - self.began, processes)
