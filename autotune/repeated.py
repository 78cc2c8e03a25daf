"""A call as the op makes it from the second time on: what benches time, for that is what a program pays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from ..registry.backend import Pinned, PinnedByLayout, Runner
from ..registry.spec import OpSpec

__all__ = ["repeated_call"]


def repeated_call(spec: OpSpec, runner: Runner, call: Any) -> Callable[[], None]:
    """``call``, its output's allocation included, on the runner pinned to such calls where there is one.

    As the op's hot path: by the batch's layout, else by bare tensors, else as a new record of the call, so that what a
    backend keeps on a call does not outlive it. Pinning may compile; nothing runs.
    """
    allocate, layout = spec.allocate, getattr(call, "layout", None)
    shown = copy.copy(call)
    shown.out = allocate(call)
    by_layout: Callable[[Any], PinnedByLayout | None] | None = getattr(runner, "pin_by_layout", None)
    laid = None if by_layout is None or layout is None else by_layout(shown)
    by_tensors: Callable[[Any], Pinned | None] | None = getattr(runner, "pin", None)
    pinned = None if by_tensors is None or laid is not None else by_tensors(shown)
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
            laid(tuple(tensors), layout)
        elif pinned is not None:
            pinned(tuple(tensors))

    return repeated
