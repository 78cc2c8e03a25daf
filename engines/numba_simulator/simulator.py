"""The CUDA side of Numba's language in Python: thread indices, barriers, warp operations, local and shared memory.

Numba brings a simulator of its own, whose threads are polled operating-system threads (20 ms a barrier) and which has
no warp operations. This one stands in for the module ``numba.cuda`` in the modules that kernels are written in, while
a kernel runs, and patches nothing of Numba's; compiling and simulating can share a process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .fibers import Fiber, Schedule, run_block

__all__ = ["Simulator"]


class _Index:
    __slots__ = ("x", "y", "z")

    def __init__(self, x: int = 0, y: int = 0, z: int = 0) -> None:
        self.x, self.y, self.z = x, y, z


class _Local:
    """``cuda.local``: registers, holding NaN until written."""

    def array(self, shape: int, dtype: Any, alignment: int | None = None) -> np.ndarray[Any, Any]:
        return _poisoned(shape, dtype)


class _Shared:
    """``cuda.shared``: one array per place in the source and block, holding NaN until written."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], np.ndarray[Any, Any]] = {}

    def array(self, shape: int, dtype: Any, alignment: int | None = None) -> np.ndarray[Any, Any]:
        frame = sys._getframe(1)
        place = frame.f_code.co_filename, frame.f_lineno
        if place not in self._arrays:
            self._arrays[place] = _poisoned(shape, dtype)
        return self._arrays[place]


def _poisoned(shape: int, dtype: Any) -> np.ndarray[Any, Any]:
    kind = np.dtype(dtype if isinstance(dtype, type) else str(dtype))  # Numba's types print as NumPy's names
    return np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).max, dtype=kind)


class Simulator:
    """What the name ``cuda`` means inside a simulated kernel: indices, warp operations, barriers.

    Attributes:
        schedule: order in which the threads of each block run.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.local = _Local()
        self.shared = _Shared()
        self.blockDim = _Index()
        self.gridDim = _Index()
        self.blockIdx = _Index()
        self._fiber: Fiber | None = None
        self._thread = _Index()

    @property
    def threadIdx(self) -> _Index:
        self._thread.x = self._now.tid
        return self._thread

    @property
    def _now(self) -> Fiber:
        assert self._fiber is not None, "outside a kernel"
        return self._fiber

    def _enter(self, fiber: Fiber | None) -> None:
        self._fiber = fiber

    def syncthreads(self) -> None:
        self._now.wait_for_block()

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        self._now.exchange("syncwarp", mask, None)

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Any:
        return self._now.exchange("shfl_sync", mask, value).get(lane % 32, value)

    def shfl_xor_sync(self, mask: int, value: Any, lane_mask: int) -> Any:
        fiber = self._now
        return fiber.exchange("shfl_xor_sync", mask, value).get(fiber.lane ^ lane_mask, value)

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        fiber = self._now
        return fiber.exchange("shfl_up_sync", mask, value).get(fiber.lane - delta, value)

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        fiber = self._now
        return fiber.exchange("shfl_down_sync", mask, value).get(fiber.lane + delta, value)

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        offered = self._now.exchange("ballot_sync", mask, bool(predicate))
        return sum(1 << lane for lane, yes in offered.items() if yes)

    def exchange_xor(self, values: np.ndarray[Any, Any], n: int, mask: int, out: np.ndarray[Any, Any]) -> None:
        """``n`` ``shfl_xor_sync`` of one lane mask in one meeting of the warp."""
        fiber = self._now
        offered = fiber.exchange("shfl_xor_sync", 0xFFFFFFFF, values[:n].copy())
        out[:n] = offered[fiber.lane ^ mask]

    def launch(
        self,
        kernel: Callable[..., None],
        grid: tuple[int, int, int],
        threads: int,
        args: tuple[Any, ...],
        on_block: Callable[[int], None] = lambda block: None,
        names: str = "isokern.",
    ) -> None:
        """Run ``kernel`` over the grid, block after block; shared memory starts poisoned in each.

        Args:
            grid, threads: blocks along x, y and z, and threads per block, all along x.
            on_block: told each block's number, counted along x first, before it runs.
            names: modules whose global ``cuda`` means this object while the kernel runs, by prefix.
        """
        x, y, z = grid
        self.gridDim, self.blockDim = _Index(x, y, z), _Index(threads, 1, 1)
        with _standing_in(self, names), np.errstate(all="ignore"):
            for block in range(x * y * z):
                self.blockIdx = _Index(block % x, block // x % y, block // (x * y))
                self.shared = _Shared()
                on_block(block)
                run_block(threads, lambda: kernel(*args), self.schedule, self._enter)


@contextmanager
def _standing_in(simulator: Simulator, names: str) -> Iterator[None]:
    """``simulator`` in the place of ``numba.cuda`` in the modules that kernels are written in."""
    from numba import cuda

    users = [m for name, m in list(sys.modules.items()) if name.startswith(names) and getattr(m, "cuda", None) is cuda]
    for module in users:
        vars(module)["cuda"] = simulator
    try:
        yield
    finally:
        for module in users:
            vars(module)["cuda"] = cuda
