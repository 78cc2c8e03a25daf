"""Dispatcher: from a problem to a bound runner, once per distinct problem. Ops put their own fast path in front."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BackendDeclinedError, BackendFailedError, IsokernError, NoBackendError, NotPreparedError
from . import overrides
from .accuracy import DEFAULT, Accuracy
from .backend import Backend, Config, Runner
from .decision import Accepted, Decision, Rule
from .forks import Forks
from .selection import Request, decide

if TYPE_CHECKING:
    from .core import Registry
    from .spec import OpSpec

__all__ = ["MAX_BOUND", "Bound", "Dispatcher"]

#: Bound runners kept per op. A serving process sees a few hundred distinct problems; beyond this the oldest go.
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
        bound: what was resolved, by problem and by what the user forced.
        misses: problems that were resolved without a tuned choice, with how often each was first met.
        generation: goes up whenever earlier resolutions no longer count.
    """

    def __init__(self, spec: OpSpec, registry: Registry) -> None:
        self.spec = spec
        self.registry = registry
        self.bound: dict[tuple[Any, Request], Bound] = {}
        self.misses: Counter[Any] = Counter()
        self.generation = 0
        self._watchers: list[Callable[[], None]] = []
        self._forks = Forks(spec.name, self.forget)

    def watch(self, forgotten: Callable[[], None]) -> None:
        """Have ``forgotten()`` called whenever earlier resolutions no longer count, after ``generation`` went up."""
        self._watchers.append(forgotten)

    def forget(self) -> None:
        """Drop what was resolved: the store, a plan, the environment or the set of backends has changed."""
        self.generation += 1
        self.bound.clear()
        for forgotten in self._watchers:
            forgotten()

    def request(self, backend: str | None) -> Request:
        """What the caller, the context and the environment force for this op."""
        name = self.spec.name
        asked = overrides.active(name)
        forced = None if asked is None else asked.backend
        return Request(backend, forced, self.registry.environment_override(name))

    def policy(self) -> Accuracy:
        """The accuracy policy in force: the context's, the environment's, or the default.

        Raises:
            ArgumentValueError: the environment names one that there is not.
        """
        name = self.spec.name
        asked = overrides.active(name)
        if asked is not None and asked.accuracy is not None:
            return asked.accuracy
        return self.registry.environment_accuracy(name) or DEFAULT

    def under_policy(self, problem: Any) -> Any:
        """``problem`` as it is looked up by: carrying the policy in force, unless it carries one of its own already.

        Problems of ops without ``accuracy`` stay as they are, which is to say under the default.
        """
        if getattr(problem, "accuracy", None) != DEFAULT or (policy := self.policy()) == DEFAULT:
            return problem
        return problem.with_accuracy(policy)

    def decide(self, problem: Any, backend: str | None = None) -> Decision:
        """The decision for ``problem``; raises as :func:`registry.selection.decide` and :meth:`policy` do."""
        problem = self.under_policy(problem)
        backends = self.registry.backends(self.spec.name)
        return decide(
            self.spec.name,
            problem,
            backends,
            self.spec.reference_backend,
            self.request(backend),
            lambda: self.registry.suggestions(self.spec, problem),
        )

    def resolve(self, problem: Any, backend: str | None = None) -> Bound:
        """The bound runner of ``problem``: as resolved before, or decided and bound now.

        While a CUDA graph is captured (``problem.mode == "graph"``) nothing is compiled: the choice must have been
        prepared, or the same problem have run outside of graphs, whose kernel then serves.

        Raises:
            NotPreparedError: in a capture, where neither is so.
            BackendFailedError: binding (compiling) the chosen backend failed; nothing was written.
            ForkedProcessError: a forked child cannot run this.
            ArgumentValueError: as :meth:`policy`.
        """
        problem = self.under_policy(problem)
        key = (problem, self.request(backend))
        bound = self.bound.get(key)
        if bound is not None:
            return bound
        generation = self.generation
        decision = self.decide(problem, backend)
        self._forks.check(problem, self._implementation(decision.backend))
        bound = self._captured(key, decision) if _mode(problem) == "graph" else self._bound(problem, decision)
        if decision.rule in (Rule.NEIGHBOUR, Rule.OTHER_SILICON, Rule.HEURISTIC, Rule.REFERENCE):
            self.misses[problem] += 1
        self._remember(key, bound, generation)
        return bound

    def prepare(self, problem: Any, backend: str | None = None) -> tuple[Bound, ...]:
        """Bind (compile) ahead what ``problem`` will run; on a GPU both called from the host and inside CUDA graphs.

        A choice that does not run inside graphs is bound for calls from the host only.

        Returns:
            What was bound: for ``problem``'s own launch mode first.

        Raises:
            BackendFailedError, ForkedProcessError: as :meth:`resolve`.
        """
        problem = self.under_policy(problem)
        made = [self._prepared(problem, backend)]
        if problem.device != "cpu" and _mode(problem) is not None:
            twin = problem.with_mode("eager" if problem.mode == "graph" else "graph")
            try:
                made.append(self._prepared(twin, backend))
            except (BackendDeclinedError, NoBackendError):
                if twin.mode == "eager":
                    raise
        return tuple(made)

    def _prepared(self, problem: Any, backend: str | None) -> Bound:
        key, generation = (problem, self.request(backend)), self.generation
        bound = self.bound.get(key)
        if bound is None:
            decision = self.decide(problem, backend)
            self._forks.check(problem, self._implementation(decision.backend))
            bound = self._bound(problem, decision)
            self._remember(key, bound, generation)
        return bound

    def _remember(self, key: tuple[Any, Request], bound: Bound, generation: int) -> None:
        if generation != self.generation:
            return  # decided by what no longer holds: good for this call only
        if len(self.bound) >= MAX_BOUND:
            self.bound.pop(next(iter(self.bound)), None)
        self.bound[key] = bound
        self._forks.used(key[0].device)

    def _captured(self, key: tuple[Any, Request], decision: Decision) -> Bound:
        problem, request = key
        if self._implementation(decision.backend).provenance == "torch":
            return self._bound(problem, decision)  # there is nothing to compile
        twin = self.bound.get((problem.with_mode("eager"), request))
        if twin is not None:
            run = twin.decision
            if (run.backend, run.config) == (decision.backend, decision.config):
                return Bound(twin.runner, decision)
            if isinstance(decision.outcome_of(run.backend), Accepted):
                wanted = f"{decision.backend} [{Config.from_dict(decision.config).label}]"
                note = f"compiled for calls from the host only; after op.prepare(...) graphs run {wanted}"
                served = dataclasses.replace(
                    decision,
                    backend=run.backend,
                    config=run.config,
                    rule=run.rule,
                    detail=run.detail,
                    notes=(*decision.notes, note),
                )
                return Bound(twin.runner, served)
        label = Config.from_dict(decision.config).label
        raise NotPreparedError(self.spec.name, decision.backend, label, problem.label)

    def _implementation(self, name: str) -> Backend:
        return self.registry.backends(self.spec.name)[name]

    def _bound(self, problem: Any, decision: Decision) -> Bound:
        return Bound(self.bind(problem, decision.backend, decision.config), decision)

    def bind(self, problem: Any, backend: str, config: Mapping[str, Any]) -> Runner:
        """Compile ``backend`` for ``problem``; errors other than isokern's own become BackendFailedError."""
        chosen = Config.from_dict(dict(config))
        try:
            return self._implementation(backend).bind(problem, chosen)
        except IsokernError:
            raise
        except Exception as error:
            raise self.failure("bind", backend, chosen, problem, error) from error

    def failure(self, stage: str, backend: str, config: Config, problem: Any, error: Exception) -> BackendFailedError:
        """The typed error for a backend that failed while binding or running."""
        text = f"{type(error).__name__}: {error}"
        return BackendFailedError(self.spec.name, backend, config.label, problem.label, stage, text)


def _mode(problem: Any) -> str | None:
    """The problem's launch mode, for ops that have one."""
    mode: str | None = getattr(problem, "mode", None)
    return mode
