"""Which backend runs: the order of precedence, applied to verdicts. Returns the Decision that explain prints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BackendDeclinedError, NoBackendError, UnknownNameError
from .accuracy import DEFAULT, admits, policy_of
from .backend import Backend, Config
from .decision import Accepted, Decision, Outcome, RejectCode, Rejected, Rule, Verdict
from .overrides import ACCURACY_PREFIX, ENVIRONMENT_PREFIX
from .plugins import checked

__all__ = ["Request", "Suggestion", "Suggestions", "decide", "verdicts"]


@dataclass(frozen=True, slots=True)
class Request:
    """What the user forces, by increasing distance from the call; None where nothing is forced."""

    argument: str | None = None
    context: str | None = None
    environment: str | None = None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A choice made earlier, by a plan or by the tuner, and where it stands."""

    rule: Rule
    backend: str
    config: dict[str, Any]
    detail: str


@dataclass(frozen=True, slots=True)
class Suggestions:
    """Earlier choices, best first, and remarks on what was looked up in vain."""

    found: tuple[Suggestion, ...] = ()
    notes: tuple[str, ...] = ()


def verdicts(backends: Mapping[str, Backend], problem: Any, named: Collection[str] = ()) -> tuple[Outcome, ...]:
    """Every backend's verdict, in heuristic order: rank, then name, so the order never depends on registration.

    A backend that rounds what others keep in float32 (``accuracy = "rounded"``) is never chosen, tuned or fallen back
    to unless it is among the ``named``, or the problem carries the policy ``"rounded"``: results of either kind must
    not stand for one another unasked.
    """
    ordered = sorted(backends.values(), key=lambda b: (-b.rank(problem), b.name))
    return tuple(Outcome(b.name, _allowed(b, checked(b, problem), problem, named)) for b in ordered)


def _allowed(backend: Backend, verdict: Verdict, problem: Any, named: Collection[str]) -> Verdict:
    if isinstance(verdict, Rejected) or backend.name in named or admits(policy_of(problem), backend):
        return verdict
    return Rejected(
        RejectCode.POLICY,
        "rounds operands of products to bfloat16: runs where it is named (backend=, registry.use), or where "
        f'accuracy="rounded" holds (registry.use, {ACCURACY_PREFIX}{backend.op.upper()})',
    )


def decide(
    op: str,
    problem: Any,
    backends: Mapping[str, Backend],
    reference_backend: str,
    request: Request,
    suggestions: Callable[[], Suggestions],
) -> Decision:
    """Choose by: argument, context, environment, plan, tuned (user, site, shipped), tuned for a neighbour, shipped for
    other silicon, heuristic order, reference.

    Args:
        suggestions: called only when nothing is forced; looks plan and tuned choices up.

    Raises:
        UnknownNameError: a forced backend is not registered.
        BackendDeclinedError: a forced backend declines the problem; nothing else is tried in its place.
        NoBackendError: every backend declines; the error lists each reason.
        PredicateError: a predicate has a bug.
    """
    named = {name for name in (request.argument, request.context, request.environment) if name is not None}
    outcomes = verdicts(backends, problem, named)
    by_name = {o.backend: o.verdict for o in outcomes}
    key = problem.key()
    forced = (
        (Rule.ARGUMENT, request.argument, "backend="),
        (Rule.CONTEXT, request.context, "registry.use(...)"),
        (Rule.ENVIRONMENT, request.environment, f"{ENVIRONMENT_PREFIX}{op.upper()}"),
    )
    for rule, name, where in forced:
        if name is None:
            continue
        if name not in by_name:
            raise UnknownNameError("backend", name, by_name)
        verdict = by_name[name]
        if isinstance(verdict, Rejected):
            raise BackendDeclinedError(op, name, verdict.code.value, verdict.reason)
        return _decision(op, key, outcomes, backends[name], None, rule, where, (), problem, verdict)

    earlier = suggestions()
    notes: list[str] = list(earlier.notes)
    for s in earlier.found:
        earned = by_name.get(s.backend)
        if isinstance(earned, Accepted):
            return _decision(
                op, key, outcomes, backends[s.backend], s.config, s.rule, s.detail, tuple(notes), problem, earned
            )
        why = earned.reason if isinstance(earned, Rejected) else "it is not registered"
        notes.append(f"{s.rule.value} choice {s.backend!r} ({s.detail}) does not apply: {why}")
    for outcome in outcomes:
        if isinstance(outcome.verdict, Accepted):
            chosen = backends[outcome.backend]
            rule = Rule.REFERENCE if chosen.name == reference_backend else Rule.HEURISTIC
            detail = f"first of {len(outcomes)} in heuristic order that accepts"
            return _decision(op, key, outcomes, chosen, None, rule, detail, tuple(notes), problem, outcome.verdict)
    raise NoBackendError(
        op, [(o.backend, o.verdict.code.value, o.verdict.reason) for o in outcomes if isinstance(o.verdict, Rejected)]
    )


def _decision(
    op: str,
    key: dict[str, Any],
    outcomes: tuple[Outcome, ...],
    backend: Backend,
    config: dict[str, Any] | None,
    rule: Rule,
    detail: str,
    notes: tuple[str, ...],
    problem: Any,
    verdict: Accepted,
) -> Decision:
    values: Config = backend.configs(problem)[0] if config is None else Config.from_dict(config)
    if policy_of(problem) != DEFAULT:
        notes = (f'policy: accuracy="{policy_of(problem)}", operands of products may be rounded to bfloat16', *notes)
    if verdict.note:
        notes = (*notes, verdict.note)
    return Decision(op, key, outcomes, backend.name, dict(values.to_dict()), rule, detail, notes)
