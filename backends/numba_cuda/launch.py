"""Launching a compiled variant on torch tensors: one parameter block rewritten per call, one driver call.

Numba's own launch unpacks every tensor into an array record, which costs 100 us and more, and reading
``__cuda_array_interface__`` synchronises. Here a call costs its ``data_ptr()`` reads and ``cuLaunchKernelEx``.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from typing import Any

import torch

from ...errors import BackendFailedError
from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .compile import Cubin
from .cubins import cubin
from .parameters import FLOATS, INTEGERS, floats, is_aligned, packer
from .variant import Variant

__all__ = ["Launcher"]

_OP = "fused_sigmoid_gating"
_LARGEST_GRID = 2**31 - 1
# Tags of cuLaunchKernel's ``extra`` list, from cuda.h.
_END, _BUFFER_POINTER, _BUFFER_SIZE = 0, 1, 2


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class _Parameters(ctypes.Structure):
    """The kernel's parameters as the driver wants them; see ``parameters``."""

    _fields_ = (("integers", ctypes.c_int64 * INTEGERS), ("floats", ctypes.c_float * len(FLOATS)))


@lru_cache(maxsize=1)
def _driver() -> Any:
    """``libcuda``. Raises OSError where there is no driver."""
    return ctypes.CDLL("libcuda.so.1")


def _succeeded(code: int) -> None:
    """Raises RuntimeError with the driver's own words."""
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {code}: {(text.value or b'unknown').decode()}")


@lru_cache(maxsize=256)
def _function(cubin: Cubin) -> ctypes.c_void_p:
    """A handle that launches in whatever context is current. Libraries stay loaded for the process's life."""
    library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    load = _driver().cuLibraryLoadData
    _succeeded(load(ctypes.byref(library), cubin.code, None, None, 0, None, None, 0))
    _succeeded(_driver().cuLibraryGetKernel(ctypes.byref(kernel), library, cubin.entry.encode()))
    return kernel


class _Frame(threading.local):
    """One thread's parameter block and launch configuration, with pointers to them that never move."""

    def __init__(self, threads: int) -> None:
        self.parameters = _Parameters()
        self.integers = self.parameters.integers
        self.floats = self.parameters.floats
        self.shapes: tuple[int, int, int] | None = None
        self.config = _LaunchConfig(grid_y=1, grid_z=1, block_x=threads, block_y=1, block_z=1)
        self._size = ctypes.c_size_t(ctypes.sizeof(self.parameters))
        self._extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER, ctypes.addressof(self.parameters), _BUFFER_SIZE, ctypes.addressof(self._size), _END
        )
        self.config_at = ctypes.c_void_p(ctypes.addressof(self.config))
        self.extra_at = ctypes.c_void_p(ctypes.addressof(self._extra))


class Launcher:
    """The bound runner of one problem and config. Compiles when made; safe to call from several threads.

    Raises:
        BackendFailedError: from the constructor (stage ``compile``) and from calls (stage ``launch``); a failed call
            has written nothing.
    """

    def __init__(self, backend: str, problem: Problem, config: Config) -> None:
        self.backend, self.problem, self.config = backend, problem, config
        self.variant = Variant.of(problem, config, wide=True)
        self._blocks_per_sequence = self.variant.hv * self.variant.tiles
        self._packer = packer(self.variant)
        self._dense = self.variant.strides == "dense"
        self._vectors = self.variant.wide_k or self.variant.wide_v
        self._wide = self._compiled(wide=True)
        # Contiguous tensors of torch are aligned; views need not be, and a capture is no time to compile.
        self._narrow = self._compiled(wide=False) if self._vectors and not self._dense else None
        self._frame = _Frame(self.variant.threads)
        self._launch = _driver().cuLaunchKernelEx

    def _compiled(self, wide: bool) -> ctypes.c_void_p:
        try:
            return _function(cubin(Variant.of(self.problem, self.config, wide), self.problem.arch))
        except _compile_errors() as error:
            raise self._failed("compile", f"{type(error).__name__}: {error}") from error

    def _failed(self, stage: str, message: str) -> BackendFailedError:
        return BackendFailedError(_OP, self.backend, self.config.label, self.problem.label, stage, message)

    def __call__(self, call: Call) -> torch.Tensor:
        """Launch on torch's current stream of q's device; returns ``call.out``."""
        out = call.out
        assert out is not None
        n = call.n
        if not n or not call.tokens:
            return out
        frame = self._frame
        integers = frame.integers
        shapes = self._packer.shapes(call)
        if not self._dense or shapes != frame.shapes:
            self._packer.fill_shapes(call, integers)
            frame.shapes = shapes
        self._packer.fill_pointers(call, integers)
        frame.floats[:] = floats(call)
        function = self._wide
        if self._vectors and not is_aligned(integers):
            if self._narrow is None:
                self._narrow = self._compiled(wide=False)
            function = self._narrow
        blocks = n * self._blocks_per_sequence
        if blocks > _LARGEST_GRID:
            raise self._failed("launch", f"{blocks} blocks, more than a grid holds")
        device = call.q.device.index
        frame.config.grid_x = blocks
        frame.config.stream = torch._C._cuda_getCurrentRawStream(device)
        if device == torch._C._cuda_getDevice():
            code = self._launch(frame.config_at, function, None, frame.extra_at)
        else:
            with torch.cuda.device(device):
                code = self._launch(frame.config_at, function, None, frame.extra_at)
        if code:
            try:
                _succeeded(code)
            except RuntimeError as error:
                raise self._failed("launch", str(error)) from error
        return out


def _compile_errors() -> tuple[type[Exception], ...]:
    """What Numba, NVVM, the linker and the driver raise for a kernel they cannot build or load."""
    from cuda.bindings.nvjitlink import nvJitLinkError
    from numba.core.errors import NumbaError
    from numba.cuda.cudadrv.error import CudaDriverError, NvvmError

    return NumbaError, NvvmError, CudaDriverError, nvJitLinkError, RuntimeError, OSError
