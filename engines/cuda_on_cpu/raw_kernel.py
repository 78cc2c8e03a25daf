"""CpuRawKernel: a CUDA C++ kernel on CPU tensors, called as ``cupy.RawKernel`` is."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .build import build_kernel, runtime

__all__ = [
    "CpuRawKernel",
    "DivergenceError",
    "KernelError",
    "KernelFault",
    "WatchError",
    "use_watched_builds",
    "watching",
]


class KernelError(RuntimeError):
    """The kernel did what no GPU would accept; the message says which thread, and what."""


class DivergenceError(KernelError):
    """A barrier or warp operation that some of its threads never reach: on a GPU it hangs, or is undefined."""


class KernelFault(KernelError):
    """An access to unmapped memory, or undefined behaviour (overflow, shift, misalignment, array bound)."""


class WatchError(KernelError):
    """An access outside the tensors, a race, or a read of unwritten shared memory; raised while watching."""


_ERRORS: dict[int, tuple[type[KernelError], str]] = {
    1: (DivergenceError, "divergent barrier"),
    2: (DivergenceError, "warp operation with a missing lane"),
    3: (KernelError, "block too large"),
    4: (KernelFault, "illegal address"),
    5: (KernelFault, "undefined behaviour"),
    6: (WatchError, "forbidden access"),
    7: (KernelError, "misused group product or copy"),
}


class _Watched:
    """Whether kernels run with a call in front of every access. Off: they run as fast as they can."""

    on = False


def use_watched_builds(on: bool) -> None:
    """Have every kernel launched from now on run in its watched build (or no longer)."""
    _Watched.on = on


def watching() -> bool:
    """Whether they do."""
    return _Watched.on


class CpuRawKernel:
    """``CpuRawKernel(code, name, options)(grid, block, args, shared_mem=0)``.

    ``args``: torch CPU tensors, numpy arrays of size one (structures, passed by value), numpy scalars, or None (a null
    pointer). As with CuPy a Python int or float becomes 64 bits wide.

    Args:
        code: CUDA C++ source with an ``extern "C" __global__`` function ``name``.
        options: NVRTC options, of which ``-D`` is honoured.
    """

    def __init__(self, code: str, name: str, options: Sequence[str] = ()) -> None:
        self.code, self.name, self.options = code, name, tuple(options)
        self._entries: dict[bool, Any] = {}

    def compile(self, watched: bool = False) -> None:
        """Build and load, if that has not happened. Raises BuildError."""
        if watched not in self._entries:
            library = runtime()
            path = build_kernel(self.code, self.name, self.options, watched=watched)
            entry = getattr(ctypes.CDLL(str(path)), f"launch_{self.name}")
            entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
            library.cuda_on_cpu_message.restype = ctypes.c_char_p
            self._entries[watched] = entry

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_mem: int = 0,
        overlaps: bool = False,
    ) -> None:
        """Launch and wait.

        Args:
            overlaps: on a GPU the launch may run beside those before it, back to the last one that may not, until its
                threads wait for them. While watching, what would not be in order then raises WatchError.

        Raises KernelError, BuildError, TypeError for an argument of another kind.
        """
        watched = _Watched.on
        self.compile(watched)
        values = [_by_value(argument) for argument in args]
        places = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        if watched:
            runtime().cuda_on_cpu_watch_launch(int(overlaps))
        outcome = self._entries[watched](_three(grid), _three(block), shared_mem, places)
        if outcome:
            kind, what = _ERRORS[outcome]
            message = runtime().cuda_on_cpu_message().decode(errors="replace")
            raise kind(f"{self.name}: {what}: {message}")


def _three(sizes: Sequence[int]) -> Any:
    return (ctypes.c_uint * 3)(*(*sizes, 1, 1)[:3])


def _by_value(argument: Any) -> np.ndarray[Any, Any]:
    """The bytes of a kernel argument, as an array that owns them."""
    match argument:
        case None:
            return np.zeros((), np.uint64)
        case torch.Tensor():
            if argument.device.type != "cpu":
                raise TypeError(f"kernel argument: expected a CPU tensor, given one on {argument.device}")
            return np.array(argument.data_ptr(), np.uint64)
        case np.ndarray():
            if argument.size != 1:
                raise TypeError(f"kernel argument: only arrays of size one are passed by value, given {argument.shape}")
            return np.ascontiguousarray(argument)
        case np.generic() | bool() | int() | float():
            return np.array(argument)
        case _:
            raise TypeError(f"kernel argument: expected a tensor, array or scalar, given {type(argument).__name__}")
