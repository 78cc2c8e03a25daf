"""A driver that launches nothing and remembers what it was told: launches without a GPU, for tests and measurements."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .driver import LAUNCH_CONFIG, Driver, address_of

__all__ = ["Launch", "RecordingLibrary"]

_ATTRIBUTE_BYTES = 72


@dataclass(frozen=True, slots=True)
class Launch:
    """One ``cuLaunchKernelEx``, read from where the driver would have read it.

    Attributes:
        code: the machine code launched. parameters: the kernel's parameters as bytes.
        grid, block, shared, stream: of the launch. attributes: its ``CUlaunchAttribute`` array.
        device: the one that was current.
    """

    code: bytes
    parameters: bytes
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    attributes: bytes
    device: int | None


class RecordingLibrary:
    """Stands for ``libcuda``.

    Attributes:
        codes: error codes to return, by function; 0 for all others.
        launches: what was launched. loaded: machine code by handle. settings: ``cuKernelSetAttribute``'s arguments.
        device: the current device. stream: the current stream. capturing: whether it is being captured.
    """

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.launches: list[Launch] = []
        self.loaded: dict[int, bytes] = {}
        self.settings: list[tuple[int, int]] = []
        self.device: int | None = None
        self.stream = 0
        self.capturing = False

    def driver(self) -> Driver:
        """The driver, for tensors on any device."""
        return Driver(
            self, lambda _device: self.stream, lambda: self.device, self._on, self._on, lambda: self.capturing
        )

    @contextmanager
    def _on(self, device: int | None) -> Iterator[None]:
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    def _code(self, function: str) -> int:
        return self.codes.get(function, 0)

    def cuLibraryLoadData(self, library: Any, code: bytes, *_options: Any) -> int:
        handle = len(self.loaded) + 1
        self.loaded[handle] = code
        library._obj.value = handle
        return self._code("cuLibraryLoadData")

    def cuLibraryGetKernel(self, kernel: Any, library: ctypes.c_void_p, _entry: bytes) -> int:
        kernel._obj.value = library.value
        return self._code("cuLibraryGetKernel")

    def cuCtxGetDevice(self, ordinal: Any) -> int:
        ordinal._obj.value = self.device or 0
        return self._code("cuCtxGetDevice")

    def cuKernelSetAttribute(self, which: int, value: int, _kernel: Any, _device: Any) -> int:
        self.settings.append((which, value))
        return self._code("cuKernelSetAttribute")

    def cuKernelGetFunction(self, function: Any, kernel: ctypes.c_void_p) -> int:
        function._obj.value = kernel.value
        return self._code("cuKernelGetFunction")

    def cuFuncLoad(self, _function: Any) -> int:
        return self._code("cuFuncLoad")

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_%d" % code
        return 0

    def cuGetErrorString(self, _code: int, text: Any) -> int:
        text._obj.value = b"the driver's own words"
        return 0

    def cuLaunchKernelEx(self, config: Any, handle: Any, params: None, extra: Any) -> int:
        if self._code("cuLaunchKernelEx"):
            return self._code("cuLaunchKernelEx")
        assert params is None
        x, y, z, *block, shared, stream, attributes, count = LAUNCH_CONFIG.unpack(
            _read(address_of(config), LAUNCH_CONFIG.size)
        )
        tags = (ctypes.c_uint64 * 5).from_buffer_copy(_read(address_of(extra), 40))
        assert (tags[0], tags[2], tags[4]) == (1, 2, 0)
        size = int.from_bytes(_read(tags[3], 8), "little")
        self.launches.append(
            Launch(
                code=self.loaded[address_of(handle)],
                parameters=_read(tags[1], size),
                grid=(x, y, z),
                block=tuple(block),
                shared=shared,
                stream=stream,
                attributes=_read(attributes, count * _ATTRIBUTE_BYTES) if count else b"",
                device=self.device,
            )
        )
        return 0


def _read(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)
