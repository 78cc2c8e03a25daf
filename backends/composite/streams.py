"""Two pieces of work at the same time on one GPU: a second stream that leaves the current one and comes back to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who plans a warm-up asks composites for their configs, without torch
    from ..launch.driver import Driver

__all__ = ["RawSide", "SideStreams"]

#: Above that of torch's own streams, which is the lowest there is.
_PRIORITY = -1


@dataclass(frozen=True, slots=True)
class _Side:
    """A stream, and what marks the places where it starts and where it ends."""

    stream: Any
    begin: Any
    end: Any


@dataclass(frozen=True, slots=True)
class RawSide:
    """The same by handles, for launches that name their stream: nobody's current stream changes.

    Made of torch's objects because each of those costs some microseconds to use, and a call uses five.

    Attributes:
        stream: the raw side stream.
    """

    stream: int
    _stream: c_void_p
    _begin: c_void_p
    _end: c_void_p

    def leave(self, driver: Driver, current: int) -> None:
        """Let what is queued on the side stream from now on come after all that is queued on ``current``, a raw stream
        of the current device. Raises DriverError.
        """
        library = driver.library
        driver.succeeded(library.cuEventRecord(self._begin, c_void_p(current)))
        driver.succeeded(library.cuStreamWaitEvent(self._stream, self._begin, 0))

    def come_back(self, driver: Driver, current: int) -> None:
        """Let what is queued on ``current`` from now on come after all that is queued on the side stream."""
        library = driver.library
        driver.succeeded(library.cuEventRecord(self._end, self._stream))
        driver.succeeded(library.cuStreamWaitEvent(c_void_p(current), self._end, 0))


@dataclass(slots=True)
class _Mine:
    """A thread's side streams, by device."""

    sides: dict[Any, _Side] = field(default_factory=dict)
    raw: dict[Any, RawSide] = field(default_factory=dict)


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

    def raw(self, device: Any) -> RawSide:
        """The thread's side stream of ``device``, which is the current one, by handles.

        What :meth:`both` promises holds for what is queued between ``leave`` and ``come_back``, which has to be called
        whatever happens, if the memory that the side stream uses is given back to the current stream afterwards.
        """
        mine = self._of_thread()
        side = mine.raw.get(device)
        if side is None:
            cuda = self._torch_cuda()
            made, current = self._side(cuda, device), cuda.current_stream(device)
            for event in (made.begin, made.end):
                event.record(current)  # an event has no handle before
            stream, begin, end = made.stream.cuda_stream, made.begin.cuda_event, made.end.cuda_event
            side = mine.raw[device] = RawSide(stream, c_void_p(stream), c_void_p(begin), c_void_p(end))
        return side

    def _of_thread(self) -> _Mine:
        mine: _Mine | None = getattr(self._mine, "mine", None)
        if mine is None:
            mine = self._mine.mine = _Mine()
        return mine

    def _side(self, cuda: Any, device: Any) -> _Side:
        sides = self._of_thread().sides
        if device not in sides:
            stream = cuda.Stream(device=device, priority=_PRIORITY)
            sides[device] = _Side(stream, cuda.Event(), cuda.Event())
        return sides[device]

    def _torch_cuda(self) -> Any:
        if self._cuda is None:
            import torch

            self._cuda = torch.cuda
        return self._cuda
