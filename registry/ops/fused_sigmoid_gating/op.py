"""The callable users get from ``registry.get("fused_sigmoid_gating")``."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch

from ....errors import ArgumentTypeError
from ...backend import pin
from ...decision import Decision
from ...dispatch import Dispatcher
from ...explain import render
from .hot import HotPath
from .problem import Problem
from .validate import canonical_call

__all__ = ["FusedSigmoidGating"]


class FusedSigmoidGating(partial[torch.Tensor], HotPath):
    """The fused sigmoid-gated delta rule: gates, L2 norm, recurrence and state pool in one call.

    See ``__call__`` for the contract. The same object serves every shape; the backend is chosen per call. It may be
    called inside ``torch.compile``, ``torch.export`` and CUDA graphs.
    """

    name = "fused_sigmoid_gating"
    dispatcher: Dispatcher

    def __new__(cls, dispatcher: Dispatcher) -> Self:
        # To call an object whose class has a ``__call__`` of its own, Python makes a tuple and a dictionary of what it
        # is given: 0.46 us, where a function takes 0.19. ``partial`` hands the arguments on as they come: 0.24, from
        # Python 3.12 on (before, its subclasses do not). It hands them to another object with the same entries: this
        # one cannot be among its own arguments.
        return super().__new__(cls, HotPath.__call__, HotPath(dispatcher))

    def __init__(self, dispatcher: Dispatcher) -> None:
        [hot] = self.args
        vars(self).update(vars(hot))
        self.dispatcher = dispatcher
        vars(self)["__call__"] = hot.__call__  # for those who keep it: the method, not partial's

    def __copy__(self) -> Self:
        return self  # as functions are copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def decide(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Decision:
        """The decision a call with these arguments leads to. Runs and writes nothing."""
        kwargs.pop("validate", None)
        call = canonical_call(*args, **kwargs)
        return self.dispatcher.decide(self.dispatcher.spec.problem(call, None), backend)

    def explain(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Decision:
        """Print the decision for these arguments: the choice, the rule, each backend's verdict; and return it."""
        decision = self.decide(*args, backend=backend, **kwargs)
        print(render(decision))
        return decision

    def prepare(
        self, *args: Any, problem: Problem | None = None, backend: str | None = None, **kwargs: Any
    ) -> Decision:
        """Compile ahead what a call with these arguments runs, from the host and, on a GPU, inside CUDA graphs.

        Runs and writes nothing; such a call compiles nothing afterwards.

        Args:
            problem: instead of arguments; then kernels that are specialised by more than their problem (by the
                alignment of addresses, say) may still meet something new in the first call.

        Returns:
            The decision for calls in the present launch mode (from the host, unless a capture is going on).

        Raises:
            ArgumentTypeError: neither arguments nor a problem, or both.
            BackendFailedError, BackendDeclinedError, NoBackendError, UnknownNameError, ForkedProcessError: as a call.
        """
        kwargs.pop("validate", None)
        if (problem is None) is not bool(args or kwargs):
            raise ArgumentTypeError("problem", "a call's arguments or a problem", "both" if problem else "neither")
        if problem is not None:
            return self.dispatcher.prepare(problem, backend)[0].decision
        spec = self.dispatcher.spec
        call = canonical_call(*args, **kwargs)
        made = self.dispatcher.prepare(spec.problem(call, None), backend)
        if call.out is None and not call.requires_grad():
            call.out = spec.allocate(call)
        if call.n and call.tokens:
            for bound in made:
                pin(bound.runner, call)  # compiles what depends on more than the problem
        return made[0].decision

    def stats(self) -> dict[str, int]:
        """Counters since the op was made.

        ``hits``: calls recognised at once; ``misses``: calls that were validated and decided; ``entries`` and
        ``evicted``: kinds of calls remembered and dropped for others; ``bound``: problems with a runner; ``untuned``:
        problems that no tuned choice and no plan decided.
        """
        counted = self.entries.counters()
        return {**counted, "bound": len(self.dispatcher.bound), "untuned": len(self.dispatcher.misses)}

    def __repr__(self) -> str:
        names = ", ".join(self.dispatcher.registry.backends(self.name))
        return f"<op {self.name}: {names}>"
