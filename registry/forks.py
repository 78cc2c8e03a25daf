"""What a forked child must not run: a fork copies neither a CUDA context nor torch's threads."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

from ..errors import ForkedProcessError
from .backend import Backend

__all__ = ["Forks"]


class Forks:
    """Remembers what an op has used in this process, and in a child forked from it refuses what is lost.

    Calls cost nothing: the child's first call of each kind takes the slow path, because ``forget`` runs at the fork.
    """

    def __init__(self, op: str, forget: Callable[[], None]) -> None:
        self._op = op
        self._used: set[str] = set()
        self._cuda_lost = False
        self._threads_lost = False
        ref = weakref.ref(self)
        owner = weakref.WeakMethod(forget)

        def in_child() -> None:
            forks, forget_all = ref(), owner()
            if forks is not None and forget_all is not None:
                forks._in_child()
                forget_all()

        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=in_child)

    def used(self, device: str) -> None:
        """The op runs on ``device`` (``cpu``, ``cuda``) in this process."""
        self._used.add(device)

    def check(self, problem: Any, backend: Backend) -> None:
        """Raise ForkedProcessError if ``backend`` cannot run ``problem`` in this process."""
        if self._cuda_lost and problem.device == "cuda":
            raise ForkedProcessError(
                self._op, "a CUDA device was in use", "start workers with the 'spawn' or 'forkserver' method"
            )
        uses_threads = backend.provenance in ("torch", "composite")  # a composite's parts may be torch's
        if self._threads_lost and problem.device == "cpu" and uses_threads and _torch_threads() > 1:
            raise ForkedProcessError(
                self._op,
                "torch's CPU threads were in use",
                "start workers with the 'spawn' or 'forkserver' method, or call torch.set_num_threads(1) in the child",
            )

    def _in_child(self) -> None:
        self._cuda_lost |= "cuda" in self._used
        self._threads_lost |= "cpu" in self._used and _torch_threads() > 1


def _torch_threads() -> int:
    """Threads of torch's CPU operators; 1 where torch is not imported."""
    torch = sys.modules.get("torch")
    return 1 if torch is None else int(torch.get_num_threads())
