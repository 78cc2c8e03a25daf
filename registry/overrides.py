"""What users ask for: ``registry.use`` (a context), ``ISOKERN_BACKEND_<OP>``, ``ISOKERN_ACCURACY_<OP>`` (read once)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

from ..errors import ArgumentTypeError
from .accuracy import Accuracy, require

__all__ = [
    "ACCURACY_PREFIX",
    "ENVIRONMENT_PREFIX",
    "NO_OVERRIDES",
    "Override",
    "active",
    "current_overrides",
    "environment_accuracies",
    "environment_overrides",
    "use",
]

ENVIRONMENT_PREFIX = "ISOKERN_BACKEND_"
ACCURACY_PREFIX = "ISOKERN_ACCURACY_"


class Override(NamedTuple):
    """What a context asks for; None where it leaves things as they are. A tuple: hot paths compare it."""

    backend: str | None = None
    accuracy: Accuracy | None = None


#: What :data:`current_overrides` returns outside of :func:`use`: one object, to be told by identity.
NO_OVERRIDES: Mapping[str, Override] = MappingProxyType({})
_ACTIVE: ContextVar[Mapping[str, Override]] = ContextVar("isokern_overrides", default=NO_OVERRIDES)

#: ``{op: what is asked for}`` in the current context. A C function, for hot paths.
current_overrides: Callable[[], Mapping[str, Override]] = _ACTIVE.get


def active(op: str) -> Override | None:
    """What is asked for ``op`` in the current context, if anything."""
    return _ACTIVE.get().get(op)


def use(op: str, backend: str | None = None, *, accuracy: str | None = None) -> AbstractContextManager[None]:
    """Within the block, and in tasks and coroutines started in it, ``op`` runs on ``backend`` or raises, and its choice
    is made under the policy ``accuracy``. What is None stays as outside of the block.

    Raises:
        ArgumentTypeError: neither is given. ArgumentValueError: no such policy. At once, not on entry.
    """
    if backend is None and accuracy is None:
        raise ArgumentTypeError("backend, accuracy", "at least one of them", "neither")
    return _within(op, backend, None if accuracy is None else require("accuracy", accuracy))


@contextmanager
def _within(op: str, backend: str | None, accuracy: Accuracy | None) -> Iterator[None]:
    outside = _ACTIVE.get()
    before = outside.get(op, Override())
    wanted = Override(before.backend if backend is None else backend, accuracy or before.accuracy)
    token = _ACTIVE.set(MappingProxyType({**outside, op: wanted}))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def environment_overrides(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """``{op: backend}`` from ``ISOKERN_BACKEND_<OP>`` variables (op in upper case)."""
    return _variables(ENVIRONMENT_PREFIX, environ)


def environment_accuracies(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """``{op: policy}`` from ``ISOKERN_ACCURACY_<OP>`` variables, as they are written: unknown policies, too."""
    return _variables(ACCURACY_PREFIX, environ)


def _variables(prefix: str, environ: Mapping[str, str] | None) -> dict[str, str]:
    source = os.environ if environ is None else environ
    named = {name: value for name, value in source.items() if name.startswith(prefix) and value}
    return {name.removeprefix(prefix).lower(): value for name, value in named.items()}
