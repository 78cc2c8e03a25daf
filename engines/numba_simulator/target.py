"""The target of simulated kernels: Python for what touches CUDA, Numba's CPU compiler for plain array code."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ...backends.numba_cuda.target import Function, Target, quad_words
from .memory import CheckedMemory, decode, values_of

__all__ = ["simulated"]


def simulated(memory: CheckedMemory, exchange: Callable[[int], Function]) -> Target:
    """Device functions run as Python, thread by thread; the arithmetic on registers is compiled for the CPU.

    The compiled part is the same source that Numba compiles for the GPU, so its types are Numba's and not Python's.
    """
    import numba

    @numba.njit
    def fma(x: Any, y: Any, z: Any) -> Any:
        # The product of two float32 is exact in float64, the sum rounds once there and once more on the way back.
        return np.float32(np.float64(x) * np.float64(y) + np.float64(z))

    def device(function: Function) -> Function:
        return function

    def pure(function: Function) -> Function:
        return numba.njit(function, error_model="numpy")

    return Target(
        device=device,
        pure=pure,
        value=pure,
        index=pure,
        load=memory.load,
        store=memory.store,
        load_raw=memory.load_raw,
        decode=decode,
        load_raw_quad=memory.load_raw_quad,
        decode_quad=_decode_quad,
        load_vector=partial(_load_vector, memory),
        store_vector=partial(_store_vector, memory),
        load_index=memory.load_index,
        exchange=exchange,
        read_quad=_read_quad,
        write_quad=_write_quad,
        read_one=_read_one,
        pin=lambda value: value,
        fma=fma,
        exp=_float32(numba, math.exp, np.inf),
        log1p=_float32(numba, math.log1p, np.nan),
        rsqrt=_rsqrt(numba),
        divide=_divide(numba),
    )


def _load_vector(memory: CheckedMemory, dtype: str, n: int, streaming: bool) -> Function:
    load = memory.load_vector(dtype, n)

    def into(address: int, out: np.ndarray[Any, Any], first: int, step: int) -> None:
        for x, value in enumerate(load(address)):
            out[first + x * step] = value

    return into


def _store_vector(memory: CheckedMemory, dtype: str, n: int, streaming: bool) -> Function:
    store = memory.store_vector(dtype, n)

    def from_registers(address: int, values: np.ndarray[Any, Any], first: int, step: int) -> None:
        store(address, tuple(values[first + x * step] for x in range(n)))

    return from_registers


def _decode_quad(dtype: str) -> Function:
    words = quad_words(dtype)

    def into(raw: np.ndarray[Any, Any], at: int, out: np.ndarray[Any, Any], first: int) -> None:
        out[first : first + 4] = values_of(raw[at : at + words].tobytes(), dtype)

    return into


def _checked_quad(array: np.ndarray[Any, Any], at: int) -> slice:
    if at % 4:
        raise IndexError(f"16-byte access to shared memory at element {at}")
    if not 0 <= at <= len(array) - 4:
        raise IndexError(f"shared memory of {len(array)} elements accessed at {at}")
    return slice(at, at + 4)


def _read_quad(array: np.ndarray[Any, Any], at: int, out: np.ndarray[Any, Any], first: int) -> None:
    out[first : first + 4] = array[_checked_quad(array, at)]


def _write_quad(array: np.ndarray[Any, Any], at: int, values: np.ndarray[Any, Any], first: int) -> None:
    array[_checked_quad(array, at)] = values[first : first + 4]


def _read_one(array: np.ndarray[Any, Any], at: int) -> Any:
    if not 0 <= at < len(array):
        raise IndexError(f"shared memory of {len(array)} elements accessed at {at}")
    return array[at]


def _float32(numba: Any, function: Any, overflow: float) -> Function:
    @numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def rounded(x: Any) -> Any:
        return np.float32(function(np.float64(x)))

    return rounded  # type: ignore[no-any-return]


def _rsqrt(numba: Any) -> Function:
    @numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def rsqrt(x: Any) -> Any:
        return np.float32(1.0 / math.sqrt(np.float64(x)))

    return rsqrt  # type: ignore[no-any-return]


def _divide(numba: Any) -> Function:
    @numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def divide(x: Any, y: Any) -> Any:
        return np.float32(np.float32(x) / np.float32(y))

    return divide  # type: ignore[no-any-return]
