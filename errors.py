"""Every error isokern raises on purpose, all under :class:`IsokernError`.

Argument errors are also the built-in ``ValueError`` or ``TypeError`` a caller would expect, and they
carry the argument's name, what was expected and what was given as attributes, so an engine can log
them without parsing text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BackendDeclinedError",
    "BackendFailedError",
    "CatalogueError",
    "ForkedProcessError",
    "IntegrationError",
    "IsokernError",
    "NoBackendError",
    "NotPreparedError",
    "PlanError",
    "PredicateError",
    "RegistrationError",
    "StoreError",
    "UnknownNameError",
    "WorkloadError",
]


class IsokernError(Exception):
    """Base of all errors raised by isokern itself."""


class ArgumentError(IsokernError):
    """A call argument is unusable. Raised before anything is written.

    Attributes:
        argument: name of the offending argument.
        expected: what the contract asks for, in words.
        given: what the caller passed, in words.
        hint: what may help; "" if there is none.
    """

    def __init__(self, argument: str, expected: str, given: str, hint: str = "") -> None:
        self.argument = argument
        self.expected = expected
        self.given = given
        self.hint = hint
        text = f"{argument}: expected {expected}, given {given}"
        super().__init__(f"{text} ({hint})" if hint else text)


class ArgumentValueError(ArgumentError, ValueError):
    """Wrong rank, shape, value or combination."""


class ArgumentTypeError(ArgumentError, TypeError):
    """Wrong Python type or dtype."""


def near_matches(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """The known names closest to ``name``, best first, at most three."""
    return tuple(difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5))


class UnknownNameError(IsokernError, ValueError):
    """A name (op, backend, model, workload, ...) that nothing is registered under."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind = kind
        self.name = name
        self.known = tuple(sorted(known))
        self.near = near_matches(name, self.known)
        text = f"unknown {kind} {name!r}"
        if self.near:
            text += f"; did you mean {' or '.join(repr(n) for n in self.near)}?"
        text += f" Known: {', '.join(self.known) or 'none'}."
        super().__init__(text)


class RegistrationError(IsokernError, ValueError):
    """An op or a backend is registered twice, or without something it must bring."""


class PredicateError(IsokernError, RuntimeError):
    """A backend's ``check`` raised or returned something that is no decision: a bug in that backend."""


class BackendDeclinedError(IsokernError, ValueError):
    """The backend asked for by name cannot do this problem.

    Attributes: ``backend``, ``code`` (see ``registry.decision.RejectCode``), ``reason``.
    """

    def __init__(self, op: str, backend: str, code: str, reason: str) -> None:
        self.op = op
        self.backend = backend
        self.code = code
        self.reason = reason
        super().__init__(f"backend {backend!r} of op {op!r} declines this call [{code}]: {reason}")


class NoBackendError(IsokernError, ValueError):
    """No registered backend can do this problem; ``rejections`` lists (backend, code, reason)."""

    def __init__(self, op: str, rejections: Iterable[tuple[str, str, str]]) -> None:
        self.op = op
        self.rejections = tuple(rejections)
        lines = "".join(f"\n  {name}: [{code}] {reason}" for name, code, reason in self.rejections)
        super().__init__(f"no backend of op {op!r} can do this call:{lines or ' none registered'}")


class BackendFailedError(IsokernError, RuntimeError):
    """A backend failed to compile or to launch. Names op, backend, config and problem."""

    def __init__(self, op: str, backend: str, config: str, problem: str, stage: str, message: str) -> None:
        self.op = op
        self.backend = backend
        self.config = config
        self.problem = problem
        self.stage = stage
        super().__init__(
            f"{stage} failed: op {op!r}, backend {backend!r}, config [{config}], problem {problem}: {message}"
        )


class NotPreparedError(IsokernError, RuntimeError):
    """A call inside a CUDA graph capture needs a kernel that is not compiled yet; nothing was compiled or launched.

    Attributes: ``op``, ``backend``, ``config`` (its label), ``problem`` (its label).
    """

    def __init__(self, op: str, backend: str, config: str, problem: str) -> None:
        self.op = op
        self.backend = backend
        self.config = config
        self.problem = problem
        super().__init__(
            f"op {op!r}: backend {backend!r}, config [{config}] is not compiled for {problem}, and nothing compiles "
            f"while a CUDA graph is captured; before capturing, make one such call, or op.prepare(...) with the same "
            f"arguments, or run `isokern warmup`"
        )


class ForkedProcessError(IsokernError, RuntimeError):
    """The op was used before this process was forked, and what it used does not survive a fork."""

    def __init__(self, op: str, what: str, instead: str) -> None:
        self.op = op
        self.what = what
        super().__init__(f"op {op!r}: {what} before this process was forked, and that does not survive it; {instead}")


class IntegrationError(IsokernError, ValueError):
    """Another package's model, cache, version or argument that isokern cannot serve; nothing has been changed.

    Attributes: ``package``, ``what`` (a layer, a cache, ...), ``found`` and ``supported``, in words.
    """

    def __init__(self, package: str, what: str, found: str, supported: str, hint: str = "") -> None:
        self.package = package
        self.what = what
        self.found = found
        self.supported = supported
        text = f"{package}: {what}: found {found}, supported: {supported}"
        super().__init__(f"{text} ({hint})" if hint else text)


class CatalogueError(IsokernError, ValueError):
    """The model catalogue, or a request made of it (an impossible tensor-parallel split), is invalid."""


class WorkloadError(IsokernError, ValueError):
    """A workload file is malformed; the message starts with ``file:line``."""

    def __init__(self, source: str, line: int | None, message: str) -> None:
        self.source = source
        self.line = line
        where = f"{source}:{line}" if line is not None else source
        super().__init__(f"{where}: {message}")


class StoreError(IsokernError, RuntimeError):
    """A cache command cannot do what it was asked (never raised on the lookup path: there it is a miss)."""


class PlanError(IsokernError, ValueError):
    """A plan file is unreadable, altered, or made for another environment."""
