"""Finding backends: the built-in table, the entry-point group, and functions turned into backends."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ..errors import PredicateError, RegistrationError
from .backend import Backend, Config, Runner, fingerprint_files
from .decision import Accepted, RejectCode, Rejected, Verdict

__all__ = ["ENTRY_POINT_GROUP", "BrokenBackend", "FunctionBackend", "load_attribute", "missing_modules", "plugins"]

ENTRY_POINT_GROUP = "isokern.backends"


def load_attribute(target: str) -> Any:
    """``"package.module:attribute"`` to the attribute."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def missing_modules(backend: Backend) -> tuple[str, ...]:
    """The modules ``backend`` requires that are not installed; nothing is imported to find out."""
    return tuple(name for name in backend.requires if not _is_installed(name))


def _is_installed(name: str) -> bool:
    """Whether a module can be found, a package's without the import of the packages that it is in."""
    top, *inner = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module without a spec, which is imported already
        return True
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return spec is not None


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
        file = Path("" if (code := _code_of(self.run)) is None else code.co_filename)
        return (file,) if file.is_file() else ()

    def source_fingerprint(self) -> str:
        """Of the file that the function is written in, whatever decorates it; without one, of what it does."""
        return fingerprint_files(self.sources(), {} if self.sources() else {"code": _digest(self.run)})

    def fingerprint(self) -> str:
        return self.source_fingerprint()


def _code_of(run: Any) -> CodeType | None:
    """The code of a function, under decorators that keep it, of a partial one, of a method, of what can be called."""
    while True:
        if isinstance(run, partial):
            run = run.func
        elif hasattr(run, "__wrapped__"):
            run = run.__wrapped__
        elif hasattr(run, "__func__"):
            run = run.__func__
        elif isinstance(code := getattr(run, "__code__", None), CodeType):
            return code
        elif isinstance(run, type) or not hasattr(type(run).__call__, "__code__"):
            return None
        else:
            run = type(run).__call__


def _digest(run: Any) -> str:
    """Of a function that is in no file, in a notebook: its code, but for where it was; else its name."""
    code = _code_of(run)
    if code is None:
        return f"{getattr(run, '__module__', '')}.{getattr(run, '__qualname__', type(run).__qualname__)}"

    def contents(code: CodeType) -> list[Any]:
        constants = [contents(c) if isinstance(c, CodeType) else _shown(c) for c in code.co_consts]
        return [code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars]

    return hashlib.sha256(repr(contents(code)).encode()).hexdigest()


def _shown(constant: object) -> str:
    # The order of a set's elements changes from process to process.
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


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
    """Backends of installed distributions' entry points: classes, instances, or modules that register by decorator.

    A plugin that fails to load, or is something else, warns and becomes broken.
    """
    from importlib.metadata import entry_points  # 25 ms to import: not paid by a bare `import isokern.registry`

    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = point.load()
            backend = loaded() if isinstance(loaded, type) else loaded
            if isinstance(backend, ModuleType):
                continue
            if not isinstance(backend, Backend):
                raise TypeError(f"expected a Backend class, an instance or a module, given {loaded!r}")
            yield backend
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
