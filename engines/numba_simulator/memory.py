"""Checked raw memory: what a kernel loads from and stores to an address, and whether it may.

Values are stored as the GPU stores them (bfloat16 and float16 rounded to nearest even) and come back as float32.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

from ...registry.conformance.check import Violation

__all__ = ["CheckedMemory", "decode", "values_of"]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class CheckedMemory:
    """Loads and stores at addresses of host memory, checked for alignment and, while tensors are watched, for bounds.

    Watching also notes which bytes a block stored and loaded, so that two blocks of one launch which touch the same
    bytes, one of them writing, are told: on a GPU their order is anybody's.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, str, np.ndarray[Any, Any] | None]] = []
        self._starts: list[int] = []
        self._writers: dict[int, int] = {}
        self._readers: dict[int, int] = {}
        self.block = -1

    @contextmanager
    def watching(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While active, an access outside the elements of ``tensors`` raises Violation. Gaps of strides are outside."""
        ranges = [(*_span(t), name, _elements(t)) for name, t in tensors.items() if t.numel()]
        before = self._ranges, self._starts
        self._ranges = sorted(ranges, key=lambda r: r[0])
        self._starts = [r[0] for r in self._ranges]
        try:
            yield
        finally:
            self._ranges, self._starts = before

    def launched(self) -> None:
        """A new kernel: blocks of an earlier one are ordered before it."""
        self._writers.clear()
        self._readers.clear()

    def _check(self, address: int, size: int, storing: bool) -> None:
        if address % size:
            raise Violation(f"misaligned address: {size} bytes at {address:#x}")
        if not self._ranges:
            return
        if not any(self._contains(i, address, size) for i in self._candidates(address)):
            where = ", ".join(f"{name} [{first:#x}, {last:#x})" for first, last, name, _ in self._ranges)
            verb = "store" if storing else "load"
            raise Violation(f"{verb} of {size} bytes at {address:#x}, outside every tensor given ({where})")
        self._note(address, size, storing)

    def _candidates(self, address: int) -> range:
        return range(bisect.bisect_right(self._starts, address) - 1, -1, -1)

    def _contains(self, index: int, address: int, size: int) -> bool:
        first, last, _, inside = self._ranges[index]
        if not first <= address <= last - size:
            return False
        return inside is None or bool(inside[address - first : address - first + size].all())

    def _note(self, address: int, size: int, storing: bool) -> None:
        for at in range(address, address + size, 2):
            writer = self._writers.get(at, self.block)
            if writer != self.block:
                raise Violation(f"blocks {writer} and {self.block} both access {at:#x}, one of them writing")
            if storing:
                reader = self._readers.get(at, self.block)
                if reader != self.block:
                    raise Violation(f"block {self.block} writes {at:#x}, which block {reader} reads")
                self._writers[at] = self.block
            else:
                self._readers.setdefault(at, self.block)

    def load_index(self, address: int, wide: int) -> int:
        size = 8 if wide else 4
        self._check(address, size, False)
        return int.from_bytes(ctypes.string_at(int(address), size), "little", signed=True)

    @cache  # noqa: B019  (one object per process)
    def load(self, dtype: str) -> Callable[[int], np.float32]:
        size = _BYTES[dtype]
        if dtype == "float32":

            def read(address: int) -> np.float32:
                self._check(address, size, False)
                return np.float32(ctypes.c_float.from_address(int(address)).value)

            return read
        values = values_of(np.arange(1 << 16, dtype=np.uint16).tobytes(), dtype)

        def look_up(address: int) -> np.float32:
            self._check(address, size, False)
            found: np.float32 = values[ctypes.c_uint16.from_address(int(address)).value]
            return found

        return look_up

    @cache  # noqa: B019
    def load_raw(self, dtype: str) -> Callable[[int], np.uint32]:
        size = _BYTES[dtype]
        kind = ctypes.c_uint32 if dtype == "float32" else ctypes.c_uint16

        def read(address: int) -> np.uint32:
            self._check(address, size, False)
            return np.uint32(kind.from_address(int(address)).value)

        return read

    @cache  # noqa: B019
    def load_raw_quad(self, dtype: str) -> Callable[[int, int, int, bool, np.ndarray[Any, Any], int], None]:
        item = _BYTES[dtype]
        words = item  # of four elements

        def read(address: int, inner: int, count: int, aligned: bool, out: np.ndarray[Any, Any], at: int) -> None:
            if aligned:
                self._check(address, 4 * item, False)
                data = ctypes.string_at(int(address), 4 * item)
            else:
                places = [address + inner * x for x in range(max(0, min(4, count)))]
                for place in places:
                    self._check(place, item, False)
                data = b"".join(ctypes.string_at(int(place), item) for place in places).ljust(4 * item, b"\0")
            out[at : at + words] = np.frombuffer(data, np.uint32)

        return read

    @cache  # noqa: B019
    def load_vector(self, dtype: str, n: int) -> Callable[[int], tuple[np.float32, ...]]:
        return self._reader(dtype, n)

    @cache  # noqa: B019
    def store(self, dtype: str) -> Callable[[int, np.float32], None]:
        many = self._writer(dtype, 1)
        return lambda address, value: many(address, (value,))

    @cache  # noqa: B019
    def store_vector(self, dtype: str, n: int) -> Callable[[int, tuple[np.float32, ...]], None]:
        return self._writer(dtype, n)

    def _reader(self, dtype: str, n: int) -> Callable[[int], tuple[np.float32, ...]]:
        size = _BYTES[dtype] * n
        step = min(size, 16)

        def read(address: int) -> tuple[np.float32, ...]:
            for at in range(address, address + size, step):
                self._check(at, step, False)
            return tuple(values_of(ctypes.string_at(int(address), size), dtype))

        return read

    def _writer(self, dtype: str, n: int) -> Callable[[int, tuple[np.float32, ...]], None]:
        size = _BYTES[dtype] * n
        step = min(size, 16)

        def write(address: int, values: tuple[np.float32, ...]) -> None:
            for at in range(address, address + size, step):
                self._check(at, step, True)
            ctypes.memmove(int(address), _encode(np.array(values, dtype=np.float32), dtype), size)

        return write


def decode(dtype: str) -> Callable[[np.uint32], np.float32]:
    """The value of the bits that ``load_raw`` gives."""
    if dtype == "float32":
        return lambda bits: bits.view(np.float32)
    values = values_of(np.arange(1 << 16, dtype=np.uint16).tobytes(), dtype)
    return lambda bits: values[bits]


def values_of(data: bytes, dtype: str) -> np.ndarray[Any, Any]:
    """The float32 values of elements as they lie in memory."""
    if dtype == "float32":
        return np.frombuffer(data, np.float32)
    if dtype == "float16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _encode(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    if dtype == "float32":
        return values.tobytes()
    if dtype == "float16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16).tobytes()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the byte after the last of a tensor's elements."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + (reach + 1) * tensor.element_size()


def _elements(tensor: torch.Tensor) -> np.ndarray[Any, Any] | None:
    """Which bytes of the span belong to the tensor; None where all do, or where the span is too large to map."""
    first, last = _span(tensor)
    if tensor.numel() * tensor.element_size() == last - first or last - first > 1 << 26:
        return None
    inside = torch.zeros((last - first) // tensor.element_size(), dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return np.repeat(inside.numpy(), tensor.element_size())
