"""Two pieces of work at the same time on one GPU: a second stream that leaves the current one and comes back to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["SideStreams"]

#: Above that of torch's own streams, which is the lowest there is.
_PRIORITY = -1


@dataclass(frozen=True, slots=True)
class _Side:
    """A stream, and what marks the places where it starts and where it ends."""

    stream: Any
    begin: Any
    end: Any


class SideStreams:
    """One more stream for each GPU and each thread, made at first use.

    A thread of its own has one of its own: an event that two threads record would let one of them run ahead of its
    inputs, and a capture in one thread would take in the work of the other.

    Args:
        cuda: what to use of ``torch.cuda``; None imports it when it is needed.
    """

    def __init__(self, cuda: Any = None) -> None:
        self._cuda = cuda
        self._mine = threading.local()

    def both(self, device: Any, aside: Callable[[], None], here: Callable[[], None]) -> None:
        """Queue ``aside`` on the side stream and ``here`` on the current one of ``device``.

        Both come after all that was queued here before, and what is queued here afterwards comes after both: memory may
        be used and freed as if there were one stream. The same holds inside a capture, and where one of them raises.
        """
        cuda = self._torch_cuda()
        side, current = self._side(cuda, device), cuda.current_stream(device)
        side.begin.record(current)
        side.stream.wait_event(side.begin)
        try:
            with cuda.stream(side.stream):
                aside()
            here()
        finally:
            side.end.record(side.stream)
            current.wait_event(side.end)

    def _side(self, cuda: Any, device: Any) -> _Side:
        sides: dict[Any, _Side] | None = getattr(self._mine, "sides", None)
        if sides is None:
            sides = self._mine.sides = {}
        if device not in sides:
            stream = cuda.Stream(device=device, priority=_PRIORITY)
            sides[device] = _Side(stream, cuda.Event(), cuda.Event())
        return sides[device]

    def _torch_cuda(self) -> Any:
        if self._cuda is None:
            import torch

            self._cuda = torch.cuda
        return self._cuda
