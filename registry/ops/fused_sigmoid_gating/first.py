"""The first call of a kind: validated, decided and bound, run, and remembered for the hot path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ....errors import ArgumentValueError, BackendFailedError, IsokernError
from ...backend import Config
from ...decision import Decision
from ...dispatch import Dispatcher
from .entries import Entries
from .entry import Entry
from .problem import Problem
from .torch_op import is_traced, traced
from .validate import canonical_call
from .validate_values import check_values

__all__ = ["ARGUMENTS", "FirstCalls"]

#: The arguments of the contract; ``backend`` and ``validate`` are the registry's.
ARGUMENTS = (
    "A_log a dt_bias softplus_beta softplus_threshold q k v b initial_state_source initial_state_indices scale "
    "use_qk_l2norm_in_kernel cu_seqlens state_layout is_kda lower_bound allow_neg_eigval disable_state_update "
    "intermediate_states_buffer intermediate_state_indices retrieve_parent_token output_state_indices out max_seqlen"
).split()


class FirstCalls:
    """Serves the calls that the hot path does not know."""

    def __init__(self, dispatcher: Dispatcher, entries: Entries, has_operators: bool) -> None:
        self._dispatcher = dispatcher
        self._entries = entries
        self._has_operators = has_operators

    def __call__(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Run the call with these arguments of the op's ``__call__``, by name, and ``tensors``, which it made of them.

        Raises as that does.
        """
        validate, backend = arguments["validate"], arguments["backend"]
        if validate not in ("fast", "full"):
            raise ArgumentValueError("validate", "'fast' or 'full'", repr(validate))
        given = {name: arguments[name] for name in ARGUMENTS}
        if self._has_operators and is_traced(given.values()):
            result: torch.Tensor = traced(**given, backend=backend)
            return result
        self._entries.missed()
        dispatcher = self._dispatcher
        generation = dispatcher.generation
        call = canonical_call(**given)
        capturing = call.q.is_cuda and torch.cuda.is_current_stream_capturing()
        if validate == "full":
            if capturing:
                raise ArgumentValueError("validate", "'fast' while a CUDA graph is captured", "'full', which waits")
            check_values(call)
        problem = dispatcher.under_policy(call.problem("graph" if capturing else "eager"))
        bound = dispatcher.resolve(problem, backend)
        if call.out is None and not call.requires_grad():
            call.out = dispatcher.spec.allocate(call)
        entry = Entry.of({**given, "backend": backend}, arguments["tensors"], call, problem, bound)
        if call.n == 0 or call.tokens == 0:
            result = dispatcher.spec.allocate(call) if call.out is None else call.out
        else:
            try:
                result = bound.runner(call) if entry is None else entry.run(call)
            except IsokernError:
                raise
            except Exception as error:
                raise self.failed(bound.decision, problem, error) from error
        if entry is not None:
            self._entries.add(entry, generation)
        return result

    def failed(self, decision: Decision, problem: Problem, error: Exception) -> BackendFailedError:
        """The typed error for a runner that raised."""
        config = Config.from_dict(decision.config)
        return self._dispatcher.failure("run", decision.backend, config, problem, error)
