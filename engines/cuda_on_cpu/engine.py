"""CudaOnCpu: runs CUDA C++ backends on CPU tensors, watching their addresses and varying their schedules."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
import torch

from ...registry.conformance.check import Violation
from ...registry.decision import RejectCode
from .build import runtime
from .raw_kernel import WatchError, use_watched_builds, watching

__all__ = ["SCHEDULES", "CudaOnCpu", "watch_also"]

#: Schedules by name: what the runtime calls them, and a seed. "in turn" gives every warp one stretch after another;
#: the two "ahead" ones let one warp run as far as it can, which is what shows a missing barrier.
SCHEDULES: dict[str, tuple[int, int]] = {
    "in turn": (0, 0),
    "in turn, reversed": (1, 0),
    "first warp ahead": (2, 0),
    "last warp ahead": (3, 0),
    "random 1": (4, 1),
    "random 2": (4, 2),
}
#: Tensors a call may write.
_WRITABLE = frozenset({"pool", "intermediates", "out"})


@contextmanager
def watch_also(name: str, tensor: torch.Tensor) -> Iterator[None]:
    """Launches in here may read and write one more tensor, a kernel's own; nothing where nothing is watched."""
    if not watching():
        yield
        return
    library = runtime()
    span = _Span.over({name: tensor})
    span.allowed[:] = 2
    library.cuda_on_cpu_watch_region(name.encode(), span.begin, len(span.allowed), span.allowed.ctypes.data, 1)
    try:
        yield
    finally:
        library.cuda_on_cpu_watch_forget(name.encode())


class CudaOnCpu:
    """The engine, as the conformance suite asks for it (``registry.conformance.subject.Engine``).

    Its state is the process's one scheduler: one launch runs at a time.
    """

    name = "cuda_on_cpu"

    @contextmanager
    def watch_addresses(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While active, launches are checked access by access.

        Raises Violation for an access to a byte that is no element of ``tensors``, a write to any but the pool, the
        intermediate states and the output, a race, or a read of shared memory nobody wrote. Tensors that share
        memory are watched together: a byte may be used in every way one of them may be.
        """
        library = runtime()
        library.cuda_on_cpu_watch_region.argtypes = [
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
        library.cuda_on_cpu_watch_clear(1)
        maps = [_Span.over(group) for group in _meeting(tensors)]
        for span in maps:
            library.cuda_on_cpu_watch_region(
                span.name.encode(), span.begin, len(span.allowed), span.allowed.ctypes.data, span.writable
            )
        use_watched_builds(True)
        try:
            yield
        except WatchError as error:
            raise Violation(str(error), code=RejectCode.CANARY) from error
        except Exception as error:
            if isinstance(error.__cause__, WatchError):
                raise Violation(str(error.__cause__), code=RejectCode.CANARY) from error
            raise
        finally:
            use_watched_builds(False)
            library.cuda_on_cpu_watch_clear(0)
            del maps  # the runtime held addresses of these arrays

    def schedules(self) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
        """Every schedule: in each, all launches run their threads in that order."""
        for name in SCHEDULES:
            yield name, partial(self.schedule, name)

    @contextmanager
    def schedule(self, name: str) -> Iterator[None]:
        """Run launches under one schedule. Raises KeyError for an unknown name."""
        kind, seed = SCHEDULES[name]
        library = runtime()
        library.cuda_on_cpu_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
        library.cuda_on_cpu_schedule(kind, seed)
        try:
            yield
        finally:
            library.cuda_on_cpu_schedule(0, 0)


class _Span:
    """Consecutive bytes that hold one tensor, or several interleaved ones, and what is allowed on each."""

    def __init__(self, name: str, begin: int, allowed: np.ndarray, writable: bool) -> None:
        self.name, self.begin, self.allowed, self.writable = name, begin, allowed, writable

    @classmethod
    def over(cls, tensors: Mapping[str, torch.Tensor]) -> _Span:
        reaches = {name: _reach(t) for name, t in tensors.items()}
        begin, end = min(r[0] for r in reaches.values()), max(r[1] for r in reaches.values())
        allowed = np.zeros(end - begin, np.uint8)
        for name, t in tensors.items():
            at, width = reaches[name][0] - begin, t.element_size()
            shape, strides = (*t.shape, width), (*(s * width for s in t.stride()), 1)
            elements = np.lib.stride_tricks.as_strided(allowed[at:], shape, strides)
            np.maximum(elements, 2 if name in _WRITABLE else 1, out=elements)
        return cls(" and ".join(tensors), begin, allowed, bool(_WRITABLE & set(tensors)))


def _reach(t: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte, and of the one after the last."""
    span = 1 + sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
    return t.data_ptr(), t.data_ptr() + span * t.element_size()


def _meeting(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Groups of tensors whose reaches overlap (views into one row), in order of address."""
    group: dict[str, torch.Tensor] = {}
    end = 0
    for name, t in sorted(((n, t) for n, t in tensors.items() if t.numel()), key=lambda item: item[1].data_ptr()):
        first, last = _reach(t)
        if group and first >= end:
            yield group
            group = {}
        group[name] = t
        end = max(end, last) if len(group) > 1 else last
    if group:
        yield group
