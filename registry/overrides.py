"""What the user forces: ``registry.use`` (a context) and ``ISOKERN_BACKEND_<OP>`` (read once)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

__all__ = ["ENVIRONMENT_PREFIX", "NO_OVERRIDES", "active", "current_overrides", "environment_overrides", "use"]

ENVIRONMENT_PREFIX = "ISOKERN_BACKEND_"

#: What :data:`current_overrides` returns outside of :func:`use`: one object, to be told by identity.
NO_OVERRIDES: Mapping[str, str] = MappingProxyType({})
_ACTIVE: ContextVar[Mapping[str, str]] = ContextVar("isokern_backend_overrides", default=NO_OVERRIDES)

#: ``{op: backend}`` forced in the current context. A C function, for hot paths.
current_overrides: Callable[[], Mapping[str, str]] = _ACTIVE.get


def active(op: str) -> str | None:
    """The backend forced for ``op`` in the current context, if any."""
    return _ACTIVE.get().get(op)


@contextmanager
def use(op: str, backend: str) -> Iterator[None]:
    """Within the block, and in tasks and coroutines started in it, ``op`` runs on ``backend`` or raises."""
    token = _ACTIVE.set(MappingProxyType({**_ACTIVE.get(), op: backend}))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def environment_overrides(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """``{op: backend}`` from ``ISOKERN_BACKEND_<OP>`` variables (op in upper case)."""
    source = os.environ if environ is None else environ
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in source.items()
        if name.startswith(ENVIRONMENT_PREFIX) and value
    }
