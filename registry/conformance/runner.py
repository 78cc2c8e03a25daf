"""Running an op's checks over one backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ...errors import PredicateError, UnknownNameError
from ..backend import Backend, Config
from ..decision import RejectCode, Rejected
from ..plugins import checked
from ..spec import OpSpec
from .check import Check, Finding, Status, Tier
from .exceptions import Exceptions, load_exceptions
from .report import EXCEPTIONS, Report, Skipped
from .subject import Engine, Subject

__all__ = ["belongs_elsewhere", "peers_on", "run_checks"]


def run_checks(
    op: str | OpSpec,
    backend: Backend,
    config: Config | None = None,
    only: Iterable[str] | None = None,
    tier: Tier | str = Tier.FAST,
    on_progress: Callable[[Finding], None] | None = None,
    *,
    device: torch.device | str = "cpu",
    exceptions: Exceptions | None = None,
    peers: Sequence[Backend] | None = None,
    engine: Engine | None = None,
    fail_fast: bool = False,
) -> Report:
    """Run the op's conformance checks on ``backend``.

    Args:
        op: name of a registered op, or its spec.
        config: one setting to examine; None takes the backend's default for each problem.
        only: ids of the checks to run (``["N1", "S2"]``); None runs all that apply.
        tier: ``"fast"``, or ``"full"`` for the slow ones as well.
        on_progress: called with each finding as it is made.
        device: where the cases' tensors live.
        exceptions: instead of those in the backend's file.
        peers: backends to exchange states with; None takes the registered ones that run on ``device``.
        engine: what executes the backend's GPU language on a CPU, if it runs in one.
        fail_fast: stop at the first failure.

    Raises:
        UnknownNameError: no such op, or ``only`` names no check of it.
        RegistrationError: the exceptions file is malformed.
    """
    spec = _spec(op)
    device = torch.device(device)
    checks = {c.id: c for c in spec.checks()}
    wanted = list(checks) if only is None else list(only)
    for name in wanted:
        if name not in checks:
            raise UnknownNameError("check", name, checks)
    granted = load_exceptions(spec.name, backend) if exceptions is None else exceptions
    subject = Subject(
        backend,
        config,
        device=device,
        exceptions=granted,
        peers=peers_on(spec, device) if peers is None else peers,
        engine=engine,
    )
    skipped: list[Skipped] = []
    findings: list[Finding] = []
    chosen = [checks[name] for name in checks if name in set(wanted)]
    for finding in _findings(subject, checks, chosen, Tier(tier), skipped):
        findings.append(finding)
        if on_progress is not None:
            on_progress(finding)
        if fail_fast and finding.status in (Status.FAIL, Status.ERROR):
            break
    return Report(
        op=spec.name,
        backend=backend.name,
        config="default" if config is None else config.label,
        findings=tuple(findings),
        skipped=tuple(skipped),
        titles={c.id: c.title for c in chosen},
        excused={e.check: e.reason for e in granted.entries.values()},
        place=_place(device, engine),
    )


def belongs_elsewhere(op: str | OpSpec, backend: Backend, device: torch.device | str) -> str | None:
    """Why ``backend`` runs nothing on ``device``: another kind of device, or too old a one; None if it may.

    Asked of its predicate, with the first of the op's cases. Such a backend is no failure of the suite's.

    Raises:
        PredicateError: the predicate raised, or returned no verdict.
    """
    spec = _spec(op)
    case = next(iter(spec.cases().values()))[0]
    call = spec.canonical(**spec.make_inputs(case, device=device).kwargs)
    verdict = checked(backend, spec.problem(call, None))
    where = (RejectCode.DEVICE, RejectCode.ARCH, RejectCode.NOT_INSTALLED)
    return verdict.reason if isinstance(verdict, Rejected) and verdict.code in where else None


def _place(device: torch.device, engine: Engine | None) -> str:
    if engine is not None:
        return engine.name
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _spec(op: str | OpSpec) -> OpSpec:
    if isinstance(op, OpSpec):
        return op
    from .. import spec

    return spec(op)


def peers_on(op: str | OpSpec, device: torch.device | str) -> tuple[Backend, ...]:
    """The registered backends of the op that run on ``device``."""
    from .. import backends

    spec = _spec(op)
    return tuple(b for b in backends(spec.name).values() if not _elsewhere(spec, b, device))


def _elsewhere(spec: OpSpec, backend: Backend, device: torch.device | str) -> bool:
    try:
        return belongs_elsewhere(spec, backend, device) is not None
    except PredicateError:
        return False  # the check that meets this peer makes a finding of it


def _findings(
    subject: Subject, checks: dict[str, Check], chosen: Sequence[Check], tier: Tier, skipped: list[Skipped]
) -> Iterator[Finding]:
    yield from _impossible_exceptions(subject, checks)
    for check in chosen:
        if check.tier is Tier.FULL and tier is not Tier.FULL:
            skipped.append(Skipped(check.id, "only in tier full"))
        elif not subject.has(check.needs):
            skipped.append(Skipped(check.id, f"needs {check.needs}"))
        else:
            yield from _one(subject, check)


def _one(subject: Subject, check: Check) -> Iterator[Finding]:
    made: list[Status] = []
    for finding in check.run(subject):
        made.append(finding.status)
        yield finding
    declared = subject.exceptions.declines(check.id)
    all_declined = bool(made) and all(status is Status.DECLINED for status in made)
    if declared and not all_declined:
        yield Finding(check.id, "all", Status.ERROR, "unused exception: not every case is declined")
    if not made:
        yield Finding(check.id, "all", Status.ERROR, "no case applies to this backend")
    if made and subject.exceptions.must_be_needed(check.id) and not subject.was_relaxed(check.id):
        yield Finding(check.id, "all", Status.ERROR, "unused exception: all results are equal bit for bit")


def _impossible_exceptions(subject: Subject, checks: dict[str, Check]) -> Iterator[Finding]:
    for entry in subject.exceptions.entries.values():
        if entry.check not in checks:
            message = f"exception for an unknown check ({subject.exceptions.source})"
            yield Finding(entry.check, EXCEPTIONS, Status.ERROR, message)
        elif not entry.declares_decline and not checks[entry.check].relaxable:
            yield Finding(entry.check, EXCEPTIONS, Status.ERROR, "this check cannot be relaxed")
        elif not entry.declares_decline and not subject.may_relax(checks[entry.check]):
            message = f"the backend's tag {checks[entry.check].promise!r} promises these bits: no exception possible"
            yield Finding(entry.check, EXCEPTIONS, Status.ERROR, message)
