"""Dispatcher: from a call to a bound runner, once per distinct call; afterwards one dict lookup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BackendFailedError, IsokernError
from . import overrides
from .backend import Config, Runner
from .decision import Decision, Rule
from .selection import Request, decide

if TYPE_CHECKING:
    from .core import Registry
    from .spec import OpSpec

__all__ = ["MAX_BOUND", "Bound", "Dispatcher"]

#: Bound runners kept per op. A serving process sees a few hundred distinct calls; beyond this the oldest go.
MAX_BOUND = 4096


@dataclass(frozen=True, slots=True)
class Bound:
    """A runner ready to call, and the decision that led to it."""

    runner: Runner
    decision: Decision


class Dispatcher:
    """Resolves one op's calls. Holds the bound runners; the registry holds everything else.

    Attributes:
        spec: the op.
        bound: calls already resolved, by the op's own hand-picked key.
        misses: problems that were resolved without a tuned choice, with how often each was first met.
    """

    def __init__(self, spec: OpSpec, registry: Registry) -> None:
        self.spec = spec
        self.registry = registry
        self.bound: dict[Hashable, Bound] = {}
        self.misses: Counter[Any] = Counter()
        self.generation = 0

    def forget(self) -> None:
        """Drop resolved calls: the store, a plan, the environment or the set of backends has changed."""
        self.bound.clear()
        self.generation += 1

    def request(self, backend: str | None) -> Request:
        """What the caller, the context and the environment force for this op."""
        name = self.spec.name
        return Request(backend, overrides.active(name), self.registry.environment_override(name))

    def decide(self, problem: Any, backend: str | None = None) -> Decision:
        """The decision for ``problem``; raises as :func:`registry.selection.decide` does."""
        backends = self.registry.backends(self.spec.name)
        return decide(
            self.spec.name,
            problem,
            backends,
            self.spec.reference_backend,
            self.request(backend),
            lambda: self.registry.suggestions(self.spec, problem),
        )

    def resolve(self, key: Hashable, call: Any, backend: str | None) -> Bound:
        """Slow path: decide, bind, remember under ``key``.

        Raises:
            BackendFailedError: binding (compiling) the chosen backend failed; nothing was written.
        """
        problem = self.spec.problem(call, None)
        decision = self.decide(problem, backend)
        bound = Bound(self.bind(problem, decision.backend, decision.config), decision)
        if decision.rule in (Rule.HEURISTIC, Rule.REFERENCE):
            self.misses[problem] += 1
        if len(self.bound) >= MAX_BOUND:
            del self.bound[next(iter(self.bound))]
        self.bound[key] = bound
        return bound

    def bind(self, problem: Any, backend: str, config: Mapping[str, Any]) -> Runner:
        """Compile ``backend`` for ``problem``; errors other than isokern's own become BackendFailedError."""
        implementation = self.registry.backends(self.spec.name)[backend]
        chosen = Config.from_dict(dict(config))
        try:
            return implementation.bind(problem, chosen)
        except IsokernError:
            raise
        except Exception as error:
            raise self.failure("bind", backend, chosen, problem, error) from error

    def failure(self, stage: str, backend: str, config: Config, problem: Any, error: Exception) -> BackendFailedError:
        """The typed error for a backend that failed while binding or running."""
        text = f"{type(error).__name__}: {error}"
        return BackendFailedError(self.spec.name, backend, config.label, problem.label, stage, text)
