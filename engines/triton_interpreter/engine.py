"""The engine the conformance suite sees, and a backend as it looks inside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import IsokernError
from ...registry.backend import Backend, Config, Runner
from ...registry.decision import Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .execution import ORDERS, Executor
from .memory import watched
from .numerics import correct

__all__ = ["InterpretedBackend", "TritonInterpreter", "activate", "load", "on_gpu"]

_VARIABLE = "TRITON_INTERPRET"
#: The GPU a problem on the CPU is said to be on: what the kernels are mainly written for.
_ARCH = 90


class TritonInterpreter:
    """Executes Triton kernels on CPU tensors; see the package. Serves checks that need an engine.

    Attributes:
        executor: runs the launches.
    """

    name = "triton_interpreter"

    def __init__(self, interpreter: Any, tl: Any) -> None:
        correct(interpreter, tl)
        self._interpreter = interpreter
        self.executor = Executor(interpreter, tl)

    def watch_addresses(self, tensors: Mapping[str, torch.Tensor]) -> AbstractContextManager[Any]:
        """While active, an access outside ``tensors``, or a race, raises Violation."""
        return watched(self._interpreter, self.executor, tensors)

    def schedules(self) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
        """Orders of the programs; each launch is one after another, so that is all that can vary."""
        for name, order in ORDERS.items():
            yield name, partial(self.executor.ordered, order)


def activate() -> TritonInterpreter:
    """Turn this process into one where Triton kernels are interpreted. Once, before anything imports Triton.

    Raises:
        IsokernError: Triton has been imported already; kernels compile in this process.
    """
    if "triton" in sys.modules:
        raise IsokernError("the Triton interpreter must be chosen before Triton is imported: use a process of its own")
    os.environ[_VARIABLE] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    return TritonInterpreter(interpreter, tl)


def load() -> tuple[Backend, TritonInterpreter]:
    """The backend inside the engine, and the engine. As :func:`activate`."""
    engine = activate()
    from ...backends.triton.backend import Triton

    return InterpretedBackend(Triton()), engine


class InterpretedBackend(Backend):
    """A Triton backend that takes CPU tensors, inside the engine.

    Its predicate and its configs are the backend's own for the same problem on a GPU. The config that covers K and V
    with one tile comes first: the interpreter's cost is per program and operation, whatever the size of a tile.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        for attribute in ("op", "name", "provenance", "tags", "priority", "accuracy", "exceptions_file"):
            setattr(self, attribute, getattr(inner, attribute))

    def check(self, problem: Problem) -> Verdict:
        return self.inner.check(on_gpu(problem))

    def configs(self, problem: Problem) -> Sequence[Config]:
        offered = self.inner.configs(on_gpu(problem))
        # Reading nothing ahead is the cheapest to interpret, and reading ahead is a config of its own.
        return sorted(offered, key=lambda c: (-int(c["v_tile"]), -int(c["k_span"]), int(c["window"])))

    def bind(self, problem: Problem, config: Config) -> Runner:
        return self.inner.bind(on_gpu(problem), config)

    def sources(self) -> Sequence[Path]:
        return self.inner.sources()

    def toolchain(self) -> Mapping[str, str]:
        return self.inner.toolchain()


def on_gpu(problem: Problem) -> Problem:
    return replace(problem, device="cuda", arch=_ARCH) if problem.device == "cpu" else problem
