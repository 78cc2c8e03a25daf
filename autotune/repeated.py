"""A call as the op makes it from the second time on: what benches time, for that is what a program pays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from ..registry.backend import Runner, pin, pin_by_layout
from ..registry.spec import OpSpec

__all__ = ["repeated_call"]


def repeated_call(spec: OpSpec, runner: Runner, call: Any) -> Callable[[], None]:
    """``call``, its output's allocation included, on the runner pinned to such calls where there is one.

    As the op's hot path: by the batch's layout, else by bare tensors, else as a new record of the call, so that what a
    backend keeps on a call does not outlive it. Pinning may compile; nothing runs.
    """
    allocate, shown = spec.allocate, copy.copy(call)
    shown.out = allocate(call)
    laid = pin_by_layout(runner, shown)
    pinned = pin(runner, shown) if laid is None else None
    if laid is None and pinned is None:

        def unpinned() -> None:
            fresh = copy.copy(call)
            fresh.out = allocate(call)
            runner(fresh)

        return unpinned
    at = spec.tensors.index("out")
    tensors = [getattr(call, name) for name in spec.tensors]

    def repeated() -> None:
        tensors[at] = allocate(call)
        if laid is not None:
            laid(tuple(tensors), call.layout)
        elif pinned is not None:
            pinned(tuple(tensors))

    return repeated
