"""Finding backends: the built-in table, the entry-point group, and functions turned into backends."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import PredicateError, RegistrationError
from .backend import Backend, Config, Runner
from .decision import Accepted, RejectCode, Rejected, Verdict

__all__ = ["ENTRY_POINT_GROUP", "BrokenBackend", "FunctionBackend", "load_attribute", "missing_modules", "plugins"]

ENTRY_POINT_GROUP = "isokern.backends"


def load_attribute(target: str) -> Any:
    """``"package.module:attribute"`` to the attribute."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def missing_modules(backend: Backend) -> tuple[str, ...]:
    """The modules ``backend`` requires that are not installed; nothing is imported to find out."""
    return tuple(name for name in backend.requires if importlib.util.find_spec(name) is None)


class FunctionBackend(Backend):
    """A plain function ``run(call, **config) -> Tensor`` as a backend; what the decorator makes."""

    def __init__(
        self,
        run: Callable[..., Any],
        op: str,
        name: str,
        *,
        provenance: str = "external",
        check: Callable[[Any], Verdict] | None = None,
        configs: Sequence[Mapping[str, Any]] = ({},),
        requires: tuple[str, ...] = (),
        tags: frozenset[str] = frozenset(),
        priority: int = 10,
        accuracy: str = "recurrent",
        exceptions_file: str | None = None,
    ) -> None:
        self.run = run
        # Instance values stand in for the class attributes a written-out Backend would have.
        for key, value in {
            "op": op,
            "name": name,
            "provenance": provenance,
            "requires": requires,
            "tags": tags,
            "priority": priority,
            "accuracy": accuracy,
            "exceptions_file": exceptions_file,
        }.items():
            object.__setattr__(self, key, value)
        self._check = check
        self._configs = tuple(Config.from_dict(values) for values in configs)
        if not self._configs:
            raise RegistrationError(f"backend {name!r}: configs must not be empty")

    def check(self, problem: Any) -> Verdict:
        return Accepted() if self._check is None else self._check(problem)

    def configs(self, problem: Any) -> Sequence[Config]:
        return self._configs

    def bind(self, problem: Any, config: Config) -> Runner:
        values = config.to_dict()
        return partial(self.run, **values) if values else self.run

    def sources(self) -> Sequence[Path]:
        code = getattr(self.run, "__code__", None)
        return (Path(code.co_filename),) if code is not None and Path(code.co_filename).is_file() else ()


class BrokenBackend(Backend):
    """Stands for a plugin that failed to load, so that explain and doctor can say so."""

    def __init__(self, op: str, name: str, error: str) -> None:
        for key, value in {"op": op, "name": name, "provenance": "external", "priority": -1}.items():
            object.__setattr__(self, key, value)
        self.error = error

    def check(self, problem: Any) -> Verdict:
        return Rejected(RejectCode.NOT_INSTALLED, f"plugin failed to load: {self.error}")

    def bind(self, problem: Any, config: Config) -> Runner:
        raise RegistrationError(f"plugin {self.name!r} failed to load: {self.error}")

    def sources(self) -> Sequence[Path]:
        return ()


def plugins(known_ops: Sequence[str]) -> Iterator[Backend]:
    """Backends of installed distributions' entry points. A plugin that fails to load warns and becomes broken."""
    from importlib.metadata import entry_points  # 25 ms to import: not paid by a bare `import isokern.registry`

    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = point.load()
            yield loaded() if isinstance(loaded, type) else loaded
        except Exception as error:  # noqa: BLE001 - a plugin's import may raise anything; it is reported, not hidden
            text = f"{type(error).__name__}: {error}"
            warnings.warn(f"isokern plugin {point.name!r} ({point.value}) failed to load: {text}", stacklevel=2)
            for op in known_ops:
                yield BrokenBackend(op, point.name, text)


def checked(backend: Backend, problem: Any) -> Verdict:
    """The verdict of ``backend`` on ``problem``, through its predicate and what it requires.

    Raises:
        PredicateError: the predicate raised, or returned neither Accepted nor Rejected: a bug, never a "no".
    """
    missing = missing_modules(backend)
    if missing:
        return Rejected(RejectCode.NOT_INSTALLED, f"needs {', '.join(missing)}, which is not installed")
    try:
        verdict = backend.check(problem)
    except Exception as error:
        raise PredicateError(f"check() of backend {backend.name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(verdict, (Accepted, Rejected)):
        raise PredicateError(
            f"check() of backend {backend.name!r} returned {verdict!r}, expected Accepted() or Rejected(code, reason)"
        )
    return verdict
