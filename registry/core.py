"""Registry: the ops, their backends, and what was decided for them earlier (plans, tuned stores)."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import PlanError, RegistrationError, StoreError, UnknownNameError
from . import overrides
from .accuracy import Accuracy, require
from .backend import Backend
from .decision import Rule
from .dispatch import Dispatcher
from .plugins import load_attribute, plugins
from .selection import Suggestion, Suggestions
from .spec import OpSpec

if TYPE_CHECKING:
    from ..cache.environment import Environment
    from ..cache.plan import Plan
    from ..cache.store import Store

__all__ = ["BUILTIN_OPS", "Registry"]

BUILTIN_OPS: Mapping[str, str] = MappingProxyType(
    {"fused_sigmoid_gating": "isokern.registry.ops.fused_sigmoid_gating.spec:SPEC"}
)

_LAYER_RULES = {"explicit": Rule.TUNED_USER, "user": Rule.TUNED_USER, "memory": Rule.TUNED_USER}
_LAYER_RULES |= {"site": Rule.TUNED_SITE}  # shipped tables: see registry.stored


class Registry:
    """Any number of ops, each with any number of interchangeable backends.

    One process-wide instance stands behind the functions of :mod:`isokern.registry`; tests make their own.
    """

    def __init__(self, builtin_ops: Mapping[str, str] = BUILTIN_OPS, load_plugins: bool = True) -> None:
        self._targets = dict(builtin_ops)
        self._specs: dict[str, OpSpec] = {}
        self._ops: dict[str, Any] = {}
        self._dispatchers: dict[str, Dispatcher] = {}
        self._backends: dict[str, dict[str, Backend]] = {}
        self._load_plugins = load_plugins
        self._built_in: set[str] = set()
        self._loaded: set[str] = set()
        # Nothing is imported while it is held: whoever imports a module that registers a backend would wait for it.
        self._lock = threading.RLock()
        self._here = threading.local()
        self._environment_overrides: dict[str, str] | None = None
        self._environment_accuracies: dict[str, str] | None = None
        self._store: Store | None = None
        self._environments: dict[str, Environment] = {}
        self._plan: Plan | None = None
        self._fingerprints: dict[tuple[str, str], str] = {}
        self._sources: dict[tuple[str, str], str] = {}

    # ---- ops

    def names(self) -> tuple[str, ...]:
        """Names of all registered ops."""
        return tuple(sorted({*self._targets, *self._specs}))

    def register_op(self, spec: OpSpec) -> None:
        """Add an op. Raises RegistrationError if the name is taken."""
        if spec.name in self._specs or spec.name in self._targets:
            raise RegistrationError(f"op {spec.name!r} is already registered")
        self._specs[spec.name] = spec

    def spec(self, name: str) -> OpSpec:
        """The op's specification. Raises UnknownNameError with near matches."""
        if name not in self._specs:
            if name not in self._targets:
                raise UnknownNameError("op", name, self.names())
            spec = load_attribute(self._targets[name])
            if not isinstance(spec, OpSpec) or spec.name != name:
                raise RegistrationError(f"{self._targets[name]} is not the OpSpec of {name!r}")
            self._specs.setdefault(name, spec)
        return self._specs[name]

    def contract_version(self, name: str) -> int:
        """The version that what is stored for the op goes by. An op of isokern's own is not loaded, nor is torch.

        Raises UnknownNameError with near matches.
        """
        target = self._targets.get(name)
        if name in self._specs or target is None or target != BUILTIN_OPS.get(name):
            return self.spec(name).contract_version
        package = target.partition(":")[0].rpartition(".")[0]
        version: int = load_attribute(f"{package}.contract:CONTRACT_VERSION")
        return version

    def get(self, name: str) -> Any:
        """The op ``name`` as a callable; the same object every time. Raises UnknownNameError."""
        if name not in self._ops:
            spec = self.spec(name)
            with self._lock:
                if name not in self._ops:
                    self._ops[name] = spec.make_op(self.dispatcher(name))
        return self._ops[name]

    def dispatcher(self, name: str) -> Dispatcher:
        """What resolves the op's calls (tuner and tools use it; callers use ``get``)."""
        if name not in self._dispatchers:
            spec = self.spec(name)
            with self._lock:
                if name not in self._dispatchers:
                    self._dispatchers[name] = Dispatcher(spec, self)
        return self._dispatchers[name]

    # ---- backends

    def backends(self, name: str) -> Mapping[str, Backend]:
        """All backends of op ``name`` by backend name, built-in, from plugins and registered by hand."""
        if name not in self._loaded and not getattr(self._here, "loads", False):
            if name not in self._targets:
                self.spec(name)  # unknown, or registered by hand
            self._load_backends(name)
        return MappingProxyType(self._backends.setdefault(name, {}))

    def register_backend(self, backend: Backend, replace: bool = False) -> Backend:
        """Add a backend. Raises RegistrationError when the name is taken, UnknownNameError for an unknown op."""
        if not isinstance(backend, Backend):
            raise RegistrationError(f"expected a Backend instance, given {backend!r}")
        self.backends(backend.op)
        with self._lock:
            if backend.name in self._backends[backend.op] and not replace:
                raise RegistrationError(f"backend {backend.name!r} of op {backend.op!r} is already registered")
            self._put(backend)
            self._forget(backend.op)
        return backend

    def unregister_backend(self, op: str, name: str) -> None:
        """Remove a backend. Raises UnknownNameError."""
        if name not in self.backends(op):
            raise UnknownNameError("backend", name, self.backends(op))
        with self._lock:
            self._backends[op] = {known: backend for known, backend in self._backends[op].items() if known != name}
            self._forget(op)

    def fingerprint(self, op: str, name: str) -> str:
        """The backend's fingerprint, computed once per process."""
        key = (op, name)
        if key not in self._fingerprints:
            self._fingerprints[key] = self.backends(op)[name].fingerprint()
        return self._fingerprints[key]

    def fingerprints(self, op: str) -> dict[str, str]:
        """The fingerprint of each of the op's backends, by name."""
        return {name: self.fingerprint(op, name) for name in self.backends(op)}

    def source_fingerprints(self, op: str) -> dict[str, str]:
        """Of each of the op's backends the part of its fingerprint that is source alone, computed once per process."""
        for name, backend in self.backends(op).items():
            if (op, name) not in self._sources:
                self._sources[op, name] = backend.source_fingerprint()
        return {name: self._sources[op, name] for name in self.backends(op)}

    def _load_backends(self, name: str) -> None:
        """Find the op's backends. Threads that come at once all do; what they find is added once."""
        from ..backends import BUILTIN_BACKENDS

        self._here.loads = True  # for a plugin that registers backends while it is imported
        try:
            own = BUILTIN_BACKENDS.get(name, ()) if name in self._targets else ()  # an op of isokern's own
            built_in = [load_attribute(target)() for target in own]
            with self._lock:
                if name not in self._built_in:
                    self._built_in.add(name)
                    for backend in built_in:
                        self._add(backend)
            found = list(plugins(self.names())) if self._load_plugins else []
            with self._lock:
                if self._load_plugins:
                    self._load_plugins = False
                    for backend in found:
                        self._add(backend)
                self._loaded.add(name)  # last: after an import that failed, the next call tries again
        finally:
            self._here.loads = False

    def _add(self, backend: Backend) -> None:
        if backend.name in self._backends.setdefault(backend.op, {}):
            warnings.warn(
                f"isokern: a plugin's backend {backend.name!r} of {backend.op!r} is ignored: the name is taken",
                stacklevel=4,
            )
            return
        self._put(backend)  # nothing was decided without it: who decides has found all of them before

    def _put(self, backend: Backend) -> None:
        # Replaced as a whole: others may be looking through it.
        self._backends[backend.op] = {**self._backends.get(backend.op, {}), backend.name: backend}
        self._fingerprints.pop((backend.op, backend.name), None)
        self._sources.pop((backend.op, backend.name), None)

    # ---- what was decided earlier

    def environment_override(self, op: str) -> str | None:
        """The backend named by ``ISOKERN_BACKEND_<OP>``, read once per process (``refresh`` reads again)."""
        if self._environment_overrides is None:
            self._environment_overrides = overrides.environment_overrides()
        return self._environment_overrides.get(op.lower())

    def environment_accuracy(self, op: str) -> Accuracy | None:
        """The policy named by ``ISOKERN_ACCURACY_<OP>``, read once per process (``refresh`` reads again).

        Raises:
            ArgumentValueError: there is no such policy.
        """
        if self._environment_accuracies is None:
            self._environment_accuracies = overrides.environment_accuracies()
        named = self._environment_accuracies.get(op.lower())
        return None if named is None else require(f"{overrides.ACCURACY_PREFIX}{op.upper()}", named)

    @property
    def store(self) -> Store:
        """The tuned choices, layered; opened at first use."""
        if self._store is None:
            from ..cache.store import Store

            self._store = Store.default()
        return self._store

    def use_store(self, store: Store | None) -> None:
        """Look tuned choices up in ``store`` from now on (None: the default layers again)."""
        self._store = store
        self._forget()

    @property
    def plan(self) -> Plan | None:
        """The pinned plan, if any."""
        return self._plan

    def pin(self, plan: Plan | Path | str | None, content_hash: str | None = None) -> None:
        """Let ``plan`` decide before any tuned store; None unpins.

        Args:
            plan: a plan, or the file of one. content_hash: refuse any plan but this one.

        Raises:
            PlanError: the file is unreadable or altered, the hash is another one, or the plan was made for another
                environment (each field that differs is named). What was pinned before stays.
        """
        from ..cache.plan import Plan

        if isinstance(plan, Path | str):
            plan = Plan.load(plan)
        if plan is not None:
            plan.require(content_hash)
            plan.check(self._environment_for(plan))
        self._plan = plan
        self._forget()

    def _environment_for(self, plan: Plan) -> Environment:
        try:
            return self.environment(plan.environment.device)
        except StoreError as error:
            made_for = plan.environment.describe()
            raise PlanError(f"plan {plan.content_hash} was made for {made_for}, and there is none here") from error

    def refresh(self) -> None:
        """Read the environment's overrides and the stores again, and resolve every call anew."""
        self._environment_overrides = self._environment_accuracies = None
        self._environments.clear()
        if self._store is not None:
            self._store.refresh()
        self._forget()

    def environment(self, device: str) -> Environment:
        """What tuned choices depend on besides the problem, for ``device`` (``cpu`` or ``cuda``)."""
        if device not in self._environments:
            from ..cache.environment import current_environment

            self._environments[device] = current_environment(device)
        return self._environments[device]

    def suggestions(self, spec: OpSpec, problem: Any) -> Suggestions:
        """What the pinned plan and the tuned stores say about ``problem``, best first, and why they say no more."""
        from ..cache.found import Hit, Miss
        from ..cache.shipped import SHIPPED

        found: list[Suggestion] = []
        notes: list[str] = []
        key = problem.tuning_key()
        prints = self.fingerprints(spec.name)
        choice = None if self._plan is None else self._plan.lookup(spec.name, spec.contract_version, key)
        if self._plan is not None and choice is not None:
            detail = f"plan {self._plan.content_hash}"
            if prints.get(choice.backend) == choice.fingerprint:
                found.append(Suggestion(Rule.PLAN, choice.backend, dict(choice.config), detail))
            else:
                notes.append(f"{detail}: {choice.backend!r} has changed since it was measured, or is not registered")
        environment = self.environment(problem.device)
        result = self.store.get(spec.name, spec.contract_version, key, environment, prints)
        if isinstance(result, Hit) and result.layer != SHIPPED:
            rule, entry = _LAYER_RULES[result.layer], result.entry
            found.append(Suggestion(rule, entry.backend, dict(entry.config), f"{result.layer} store: {entry.rule}"))
        else:
            from .stored import Untuned

            elsewhere = Untuned(self, spec, problem, prints).suggestions()
            found += elsewhere.found
            tuned = any(s.rule is Rule.TUNED_SHIPPED for s in elsewhere.found)
            if isinstance(result, Miss):
                notes.append(f"not tuned{' in this environment' if tuned else ''}: {result.reason}")
            notes += elsewhere.notes
        return Suggestions(tuple(found), tuple(notes))

    def _forget(self, op: str | None = None) -> None:
        for name, dispatcher in list(self._dispatchers.items()):
            if op is None or name == op:
                dispatcher.forget()

    # ---- decorator

    def backend(self, op: str, name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: register ``run(call, **config) -> Tensor`` as a backend of ``op``; returns it unchanged.

        Options are those of :class:`registry.plugins.FunctionBackend`: check, configs, requires, tags, priority...
        """
        from .plugins import FunctionBackend

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.register_backend(FunctionBackend(run, op, name, **options))
            return run

        return register
