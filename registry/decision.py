"""Decisions as data: why a backend may or may not run a problem, and which one was chosen by which rule.

``explain`` prints these records; it has no logic of its own, so it cannot disagree with dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["Accepted", "Decision", "Outcome", "RejectCode", "Rejected", "Rule", "Verdict"]


class RejectCode(StrEnum):
    """Closed list of reasons. The first group comes from predicates, the second from the gate and the race."""

    NOT_INSTALLED = "not_installed"  # a framework the backend needs is missing
    DEVICE = "device"  # wrong device type
    ARCH = "arch"  # device too old, or too new
    DTYPE = "dtype"
    SHAPE = "shape"  # head counts, K or V out of range
    LAYOUT = "layout"  # strides or state layout
    FEATURE = "feature"  # an argument the backend does not implement
    GRAD = "grad"  # inputs require grad and the backend is not differentiable
    MODE = "mode"  # cannot run in this launch mode (graph capture, tracing)
    POLICY = "policy"  # excluded by the user's configuration
    HOPELESS = "hopeless"  # could do it, and is known to lose: not tried by the tuner

    COMPILE = "compile"  # failed to build or bind
    RAISED = "raised"  # raised while running
    WRONG = "wrong"  # outside the error bound
    NON_FINITE = "non_finite"  # poison left in the output, or NaN/inf where the reference has none
    INPUT_MODIFIED = "input_modified"
    CANARY = "canary"  # wrote state it was not given
    NOT_REPEATABLE = "not_repeatable"  # two runs differ in bits
    CRASH = "crash"  # the worker died
    TIMEOUT = "timeout"
    MEMORY = "memory"
    IMPOSSIBLE = "impossible"  # measured faster than the hardware allows
    SLOW = "slow"  # correct, but dropped by the screen or the race


@dataclass(frozen=True, slots=True)
class Accepted:
    """The backend can do the problem. ``note`` may say at what price (an internal copy, a slow path)."""

    note: str = ""

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Rejected:
    """The backend cannot, or may not, do the problem."""

    code: RejectCode
    reason: str

    def __bool__(self) -> bool:
        return False


Verdict = Accepted | Rejected


class Rule(StrEnum):
    """What made the choice, in order of precedence."""

    ARGUMENT = "argument"  # backend= in the call
    CONTEXT = "context"  # registry.use(...)
    ENVIRONMENT = "environment"  # ISOKERN_BACKEND_<OP>
    PLAN = "plan"  # a pinned plan
    TUNED_USER = "tuned-user"
    TUNED_SITE = "tuned-site"
    TUNED_SHIPPED = "tuned-shipped"
    NEIGHBOUR = "neighbour"  # tuned for a batch of about this size
    OTHER_SILICON = "other-silicon"  # a shipped table of the most similar device that has one
    HEURISTIC = "heuristic"
    REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One backend's verdict on one problem."""

    backend: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Decision:
    """The stored record of one choice.

    Attributes:
        op: op name.
        problem: the problem's key, a flat mapping of scalars.
        outcomes: every registered backend's verdict, in heuristic order.
        backend: the chosen backend.
        config: the chosen config as a flat mapping.
        rule: the rule that chose it.
        detail: what the rule looked at (store path, entry hash, environment variable, ...).
        notes: anything the caller should know (a tuned choice that no longer applies, an internal copy).
    """

    op: str
    problem: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    backend: str
    config: dict[str, Any]
    rule: Rule
    detail: str = ""
    notes: tuple[str, ...] = field(default=())

    def outcome_of(self, backend: str) -> Verdict | None:
        """The verdict on ``backend``, or None if it was not registered when the decision was made."""
        for outcome in self.outcomes:
            if outcome.backend == backend:
                return outcome.verdict
        return None
