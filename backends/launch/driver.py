"""The CUDA driver, through ctypes: its structures as bytes, loading kernels, errors in words.

Handles come from ``cuLibraryLoadData``: they belong to no context, and launch in whichever is current. So one kernel
serves every GPU of its architecture in the machine.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from . import forks
from .image import Image

__all__ = [
    "LAUNCH_CONFIG",
    "NO_CONTEXT",
    "Driver",
    "DriverError",
    "Kernel",
    "address_of",
    "attributes",
    "gpu",
    "pointer",
]

#: ``CUlaunchConfig``: grid, block, dynamic shared bytes, stream, attributes and their number.
LAUNCH_CONFIG = struct.Struct("=7I4xQQI4x")
_ATTRIBUTE = struct.Struct("=I4x64s")
# CUlaunchAttributeID, and the values that go with them.
_COOPERATIVE, _CLUSTER_DIMENSION, _CLUSTER_SCHEDULING, _OVERLAP = 2, 4, 5, 6
_SPREAD = 1
# CUfunction_attribute.
_MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER = 8, 14
#: Beyond these a kernel must be told that they are meant.
_SHARED_UNASKED, _CLUSTER_UNASKED = 48 << 10, 8

#: ``CUDA_ERROR_INVALID_CONTEXT``: what a launch returns in a thread that has done nothing with CUDA yet, too.
NO_CONTEXT = 201
# Not initialised, deinitialised, no context, no such handle, destroyed.
_STALE = frozenset({3, 4, NO_CONTEXT, 400, 709})
_STICKY = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719})  # ECC, illegal address, timeout, assert, ...
_CAPTURE = frozenset(range(900, 910))
_IMAGE = frozenset({200, 209, 218, 500})  # not an image, not for this GPU, damaged, no such kernel in it


class DriverError(RuntimeError):
    """A driver call failed. Attributes: ``code``."""

    def __init__(self, code: int, words: str) -> None:
        self.code = code
        super().__init__(words)

    @property
    def image_refused(self) -> bool:
        """Whether the machine code itself is what the driver did not like."""
        return self.code in _IMAGE


def pointer(address: int) -> Any:
    """``address`` as a C function takes it: what ctypes makes of a ``c_void_p`` in every call, made once.

    Nothing is read at the address, which may be a handle.
    """
    return ctypes.byref(ctypes.c_char.from_address(address))


def address_of(argument: Any) -> int:
    """The address that a :func:`pointer` was made from."""
    return ctypes.addressof(argument._obj)


def attributes(image: Image) -> bytes:
    """The array of ``CUlaunchAttribute`` that launches of ``image`` need; often empty."""
    wanted = []
    if image.overlaps:
        wanted.append((_OVERLAP, (1, 0, 0)))
    if image.cooperative:
        wanted.append((_COOPERATIVE, (1, 0, 0)))
    if image.cluster > 1:
        wanted.append((_CLUSTER_DIMENSION, (image.cluster, 1, 1)))
        wanted.append((_CLUSTER_SCHEDULING, (_SPREAD, 0, 0)))
    return b"".join(_ATTRIBUTE.pack(which, struct.pack("=3I", *values)) for which, values in wanted)


@dataclass(frozen=True, slots=True, eq=False)
class Driver:
    """The driver's entry points, and torch's word on what is current. Tests put stand-ins here.

    Attributes:
        library: ``libcuda``'s functions by name.
        stream: the current raw stream of a device. device: the current device. on: makes a device current.
        awake: the same, and sees to it that the device has a context and the thread uses it.
        capturing: whether the current stream is being captured into a CUDA graph.
    """

    library: Any
    stream: Callable[[Any], int]
    device: Callable[[], int | None]
    on: Callable[[int | None], AbstractContextManager[Any]]
    awake: Callable[[int | None], AbstractContextManager[Any]]
    capturing: Callable[[], bool]

    def succeeded(self, code: int) -> None:
        """Raises DriverError, in the driver's own words, unless ``code`` is 0."""
        if code:
            raise DriverError(code, self.words(code))

    def words(self, code: int) -> str:
        """What an error code means, here."""
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        self.library.cuGetErrorName(code, ctypes.byref(name))
        self.library.cuGetErrorString(code, ctypes.byref(text))
        said = f"{(name.value or b'CUDA error').decode()} ({code}): {(text.value or b'unknown').decode()}"
        if code in _STALE:
            return f"{said}; the kernel's handle is stale: its context is gone (device reset?). Start a new process"
        if code in _STICKY:
            return f"{said}; an earlier kernel on this device failed, and nothing runs on it any more in this process"
        if code in _CAPTURE:
            return f"{said}; the CUDA graph being captured is invalid"
        return said


class Kernel:
    """A loaded kernel. Stays loaded for the process's life.

    Attributes: ``image``; ``handle``, a ``CUkernel``.
    """

    __slots__ = ("_functions", "driver", "handle", "image")

    def __init__(self, driver: Driver, image: Image) -> None:
        self.driver, self.image = driver, image
        self.handle = ctypes.c_void_p()
        self._functions: dict[int | None, int] = {}
        module, library = ctypes.c_void_p(), driver.library
        driver.succeeded(library.cuLibraryLoadData(ctypes.byref(module), image.code, None, None, 0, None, None, 0))
        driver.succeeded(library.cuLibraryGetKernel(ctypes.byref(self.handle), module, image.entry.encode()))

    def ready(self, device: int | None) -> bool:
        """Whether :meth:`prepare` has been done for a device."""
        return device in self._functions

    def function(self, device: int | None) -> int:
        """The ``CUfunction`` on a device that :meth:`prepare` has been done for: launched, it takes the driver a tenth
        less time than the ``CUkernel``, which is looked up in the current context each time.
        """
        return self._functions[device]

    def prepare(self, device: int | None) -> None:
        """Load onto a device, and allow there what it needs beyond the usual; later launches do neither.

        Raises DriverError: the device lacks the shared memory, say.
        """
        if device in self._functions:
            return
        driver, library, image = self.driver, self.driver.library, self.image
        wanted = []
        if image.shared > _SHARED_UNASKED:
            wanted.append((_MAX_DYNAMIC_SHARED, image.shared))
        if image.cluster > _CLUSTER_UNASKED:
            wanted.append((_NON_PORTABLE_CLUSTER, 1))
        with driver.awake(device):
            ordinal, function = ctypes.c_int(), ctypes.c_void_p()
            driver.succeeded(library.cuCtxGetDevice(ctypes.byref(ordinal)))
            for which, value in wanted:
                driver.succeeded(library.cuKernelSetAttribute(which, value, self.handle, ordinal))
            # The driver loads lazily; a first launch that does so may wait for the device, which no capture allows.
            driver.succeeded(library.cuKernelGetFunction(ctypes.byref(function), self.handle))
            if hasattr(library, "cuFuncLoad"):  # since CUDA 12.4
                driver.succeeded(library.cuFuncLoad(function))
        self._functions = {**self._functions, device: function.value or 0}


@contextmanager
def _awake(library: Any, device: int | None) -> Iterator[None]:
    with torch.cuda.device(device):
        torch.empty(1, device="cuda")  # torch makes contexts when it must
        _bind(library, torch.cuda.current_device())
        yield


def _bind(library: Any, device: int) -> None:
    """Have this thread use the device's primary context, torch's own, if it uses none.

    The runtime library does so when it first launches something; the driver leaves it to its callers. The context is
    retained once per such thread and never released: it lasts as long as the process.
    """
    context, ordinal = ctypes.c_void_p(), ctypes.c_int()
    library.cuCtxGetCurrent(ctypes.byref(context))
    if context.value:
        return
    if library.cuDeviceGet(ctypes.byref(ordinal), device) == 0:
        library.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal)
        library.cuCtxSetCurrent(context)


@lru_cache(maxsize=1)
def gpu() -> Driver:
    """The real thing. Raises OSError where there is no driver, RuntimeError where torch sees no GPU."""
    library = ctypes.CDLL("libcuda.so.1")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    forks.watch()
    return Driver(
        library,
        torch._C._cuda_getCurrentRawStream,
        torch._C._cuda_getDevice,
        torch.cuda.device,
        partial(_awake, library),
        torch.cuda.is_current_stream_capturing,
    )
