"""Thread counts in the gate: the candidate has the threads it will be timed with, the reference has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..registry.backend import Backend, Config, Runner
from ..registry.decision import Verdict

__all__ = ["WithThreads", "torch_threads"]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block torch has ``count`` intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WithThreads(Backend):
    """``inner``, whose kernels run with ``threads`` torch threads whatever the caller has.

    The float64 reference takes thousands of steps on small tensors; shared out among threads that have to wait for
    one another (and, on a busy machine, to be scheduled) it takes ten times as long as on one.
    """

    def __init__(self, inner: Backend, threads: int) -> None:
        self._inner = inner
        self._threads = threads
        for name in ("op", "name", "provenance", "requires", "tags", "priority", "accuracy", "exceptions_file"):
            object.__setattr__(self, name, getattr(inner, name))

    def check(self, problem: Any) -> Verdict:
        return self._inner.check(problem)

    def configs(self, problem: Any) -> Sequence[Config]:
        return self._inner.configs(problem)

    def bind(self, problem: Any, config: Config) -> Runner:
        runner = self._inner.bind(problem, config)

        def run(call: Any) -> Any:
            with torch_threads(self._threads):
                return runner(call)

        return run
