"""Compiling the kernel, once per process or from Numba's cache, and running it safely from any thread."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numpy.typing import NDArray

from . import parameters as at
from .schedule import call_worker, longest_first, work

__all__ = ["Kernel", "kernel"]

_numba: Any = numba  # its annotations leave out part of what it exports
_pointer: Any = types.CPointer
_WORKER = types.void(_pointer(types.int64), _pointer(types.float64), _pointer(types.int64), types.int64)
_ENTRY = types.void(types.int64, types.int64[::1], types.float64[::1])
#: Held while compiling, and around every parallel run on a threading layer that cannot take two at once.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, slots=True)
class Kernel:
    """The compiled kernel.

    Attributes:
        worker: the compiled code of one worker, by address; it holds everything there is to optimise.
        serial, parallel: entry points ``(worker address, integers, reals)``; they release the GIL.
        threads: most threads a parallel run can have.
        exclusive: the threading layer is ``workqueue``, which aborts the process when entered twice at once.
        process: where the thread pool lives; a forked child has none.
    """

    worker: Any
    serial: Callable[[int, NDArray[np.int64], NDArray[np.float64]], None]
    parallel: Callable[[int, NDArray[np.int64], NDArray[np.float64]], None]
    threads: int
    exclusive: bool
    process: int

    def __call__(self, integers: NDArray[np.int64], reals: NDArray[np.float64]) -> None:
        """Run with ``integers[WORKERS]`` workers; the two blocks are laid out by ``parameters``."""
        code = self.worker.address
        if integers[at.WORKERS] == 1 or os.getpid() != self.process:
            self.serial(code, integers, reals)
        elif self.exclusive:
            with _ONE_AT_A_TIME:
                self.parallel(code, integers, reals)
        else:
            self.parallel(code, integers, reals)


def kernel(fingerprint: str) -> Kernel:
    """The kernel of this process. ``fingerprint`` is that of the sources and the toolchain."""
    with _ONE_AT_A_TIME:
        return _build(int(fingerprint, 16) & 0x7FFFFFFF)


@functools.cache
def _build(version: int) -> Kernel:
    # Numba's cache sees changes of this file only. The fingerprint is a constant of every function compiled here, and
    # so part of its key: a kernel compiled from other sources is never loaded.
    def worker(p: Any, r: Any, order: Any, counter: Any) -> None:
        _ = version
        work(p, r, order, counter)

    def serial(code: Any, p: Any, r: Any) -> None:
        _ = version
        order, counter = longest_first(p), np.zeros(1, np.int64)
        p[at.STARTED] = order.size
        call_worker(code, p.ctypes.data, r.ctypes.data, order.ctypes.data, counter.ctypes.data)
        counter[0] = order[0] if order.size else 0  # keeps both alive until here

    def parallel(code: Any, p: Any, r: Any) -> None:
        _ = version
        order, counter = longest_first(p), np.zeros(1, np.int64)
        p[at.STARTED] = order.size
        for _worker in numba.prange(p[at.WORKERS]):
            call_worker(code, p.ctypes.data, r.ctypes.data, order.ctypes.data, counter.ctypes.data)

    threads = torch.get_num_threads()
    compiled_worker = _cached(partial(numba.cfunc, _WORKER), worker)
    compiled_serial = _cached(partial(numba.njit, _ENTRY, nogil=True), serial)
    compiled_parallel = _cached(partial(numba.njit, _ENTRY, nogil=True, parallel=True), parallel)
    # An empty problem: starts the thread pool, after which Numba knows which threading layer it got.
    integers, reals = np.zeros(at.INTEGERS, np.int64), np.zeros(at.REALS, np.float64)
    integers[[at.WORKERS, at.VALUE_DIM, at.V_SPAN]] = 1
    compiled_parallel(compiled_worker.address, integers, reals)
    torch.set_num_threads(threads)  # Numba has set the default of an OpenMP that torch may share
    return Kernel(
        worker=compiled_worker,
        serial=compiled_serial,
        parallel=compiled_parallel,
        threads=_numba.config.NUMBA_NUM_THREADS,
        exclusive=_numba.threading_layer() == "workqueue",
        process=os.getpid(),
    )


def _cached(compiler: Callable[..., Any], function: Callable[..., None]) -> Any:
    """Compiled now, from the cache where there is a folder for one (beside the source, or the user's own)."""
    try:
        return compiler(cache=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return compiler()(function)
