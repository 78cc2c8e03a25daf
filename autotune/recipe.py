"""What travels to a worker: descriptions, as JSON. Never a tensor, never a pickle.

A worker makes the inputs up again from case and seed, and imports the backend's module by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ..cache.codec import digest
from ..errors import RegistrationError
from ..registry.accuracy import DEFAULT, Accuracy
from ..registry.backend import Backend
from ..registry.core import Registry

__all__ = ["Origin", "ProblemRecipe", "find_backend", "import_origin", "origin_of"]

_OWN_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True)
class ProblemRecipe:
    """One problem, so that another process can build it.

    Attributes:
        op: op name.
        case, twin: the op's case record and its adversarial twin (same problem, awkward layout).
        hooks: module with ``rotated_calls``, ``bytes_moved``, ``describe`` and so on for the op's canonical call
            (see ``registry.ops.fused_sigmoid_gating.timing``).
        seed: of the values to time with; the gate uses this and the following ones.
        device: ``cpu``, ``cuda`` or ``cuda:N``; mode: ``eager`` or ``graph``.
        accuracy: the policy that candidates are admitted, and the result is kept, under.
    """

    op: str
    case: Any
    twin: Any
    hooks: str
    seed: int = 0
    device: str = "cpu"
    mode: Literal["eager", "graph"] = "eager"
    accuracy: Accuracy = DEFAULT

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the case's class goes by its name."""
        kind = type(self.case)
        return {
            "op": self.op,
            "case_type": f"{kind.__module__}:{kind.__qualname__}",
            "case": asdict(self.case),
            "twin": asdict(self.twin),
            "hooks": self.hooks,
            "seed": self.seed,
            "device": self.device,
            "mode": self.mode,
            "accuracy": self.accuracy,
        }

    @property
    def values(self) -> str:
        """Identity of what a call's values depend on: all but the launch mode."""
        return digest([self.to_dict() | {"mode": ""}])

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ProblemRecipe:
        """The inverse of :meth:`to_dict`; imports the module of the case's class."""
        module, _, name = record["case_type"].partition(":")
        kind = getattr(importlib.import_module(module), name)
        rest = {f.name: record[f.name] for f in fields(cls) if f.name not in ("case", "twin")}
        return cls(case=_case(kind, record["case"]), twin=_case(kind, record["twin"]), **rest)


def _case(kind: type, values: Mapping[str, Any]) -> Any:
    # JSON knows lists only; case records are hashable and so hold tuples only
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a backend that is neither built in nor a plugin comes from.

    Attributes:
        module, file: its module's name and file.
        attribute: its class, instantiated without arguments unless importing the module registers the backend; ""
            for one made of a function, which only its module's import can register again.
    """

    module: str
    file: str
    attribute: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def origin_of(backend: Backend) -> Origin | None:
    """Where a worker finds ``backend``; None for what every process finds: built-in backends and plugins.

    A plugin's origin is given as well, and is not used where the entry point has already brought the backend.
    """
    run = getattr(backend, "run", None)
    subject: Any = run if inspect.isfunction(run) else type(backend)
    module = sys.modules.get(subject.__module__)
    if module is None or subject.__module__.partition(".")[0] == _OWN_PACKAGE:
        return None
    file = getattr(module, "__file__", None)
    attribute = "" if subject is run else type(backend).__qualname__
    return Origin(subject.__module__, str(Path(file).resolve()), attribute) if file else None


def find_backend(registry: Registry, op: str, name: str, origin: Origin | None) -> Backend:
    """The backend ``name``, importing where it comes from if need be.

    Raises:
        RegistrationError: it cannot be found. Whatever the import raises passes through.
    """
    if name not in registry.backends(op) and origin is not None:
        module = import_origin(origin)
        if name not in registry.backends(op) and origin.attribute:
            kind: Any = module
            for part in origin.attribute.split("."):
                kind = getattr(kind, part, None)
            if isinstance(kind, type) and issubclass(kind, Backend):
                registry.register_backend(kind())
    found = registry.backends(op).get(name)
    if found is None:
        where = f"module {origin.module!r} ({origin.file}) does not register it" if origin else "nothing registers it"
        raise RegistrationError(f"a fresh process cannot find backend {name!r} of op {op!r}: {where}")
    return found


def import_origin(origin: Origin) -> ModuleType:
    """Import by name where that finds this very file, else by path (a script, a test file).

    Raises:
        RegistrationError: the file is not a Python module. Whatever the import raises passes through.
    """
    if origin.module != "__main__":
        try:
            spec = importlib.util.find_spec(origin.module)
        except (ImportError, ValueError):  # no such parent package; or a module without a spec
            spec = None
        if spec is not None and spec.origin and Path(spec.origin).resolve() == Path(origin.file):
            return importlib.import_module(origin.module)
    # A script's own name would run what stands under its ``__name__ == "__main__"``.
    alias = "isokern_origin_" + Path(origin.file).stem
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, origin.file)
        if spec is None or spec.loader is None:
            raise RegistrationError(f"{origin.file} is not a Python module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[alias]  # half a module must not pass for a whole one on the next try
            raise
    return sys.modules[alias]
