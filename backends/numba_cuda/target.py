"""Target: the operations a kernel is written in. Numba's CUDA compiler has one set, an engine on a CPU another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

__all__ = ["Function", "Target", "gpu"]

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Target:
    """What kernel factories build on. Addresses are integers, values float32, however they are stored.

    Attributes:
        device: decorator of functions that use CUDA features (shuffles, barriers, thread indices).
        pure: decorator of functions of scalars and arrays alone.
        load, store: ``load(dtype)(address)`` and ``store(dtype)(address, value)``; stores round to nearest even.
        load_raw, decode: ``decode(dtype)(load_raw(dtype)(address))`` is ``load(dtype)(address)``; the uint32 in between
            may still be under way while other work is done.
        load_vector, store_vector: ``load_vector(dtype, n)(address)`` gives ``n`` values as a tuple, from an address
            aligned to ``min(16, n * itemsize)`` bytes; ``store_vector(dtype, n)(address, values)``.
        load_index: ``(address, wide)``: an int32, or where ``wide`` an int64, as an integer.
        exchange: ``exchange(n)(values, mask, out)``: ``n`` values of the lane whose number differs in ``mask``.
        shared_quad: ``(array, at)``: four values of a shared float32 array from ``at``, a multiple of four.
        fma: ``(x, y, z)``: ``x * y + z`` rounded once. exp, log1p: within 2 ulp. rsqrt: within 2 ulp.
        divide: within 2 ulp, exact by 1, for divisors up to 2**126.
    """

    device: Callable[[Function], Function]
    pure: Callable[[Function], Function]
    load: Callable[[str], Function]
    store: Callable[[str], Function]
    load_raw: Callable[[str], Function]
    decode: Callable[[str], Function]
    load_vector: Callable[[str, int], Function]
    store_vector: Callable[[str, int], Function]
    load_index: Function
    exchange: Callable[[int], Function]
    shared_quad: Function
    fma: Function
    exp: Function
    log1p: Function
    rsqrt: Function
    divide: Function


def _shuffles(n: int, inlined: Callable[[Function], Function]) -> Function:
    from numba import cuda

    @inlined
    def exchange(values: Any, mask: Any, out: Any) -> Any:
        for i in range(n):
            out[i] = cuda.shfl_xor_sync(0xFFFFFFFF, values[i], mask)

    return exchange


@lru_cache(maxsize=1)
def gpu() -> Target:
    """Numba's CUDA compiler. Functions are inlined before typing, so nothing here needs a GPU to be present."""
    from numba import cuda
    from numba.cuda import libdevice

    from . import intrinsics

    inlined = cuda.jit(device=True, inline="always")
    return Target(
        device=inlined,
        pure=inlined,
        load=intrinsics.load,
        store=intrinsics.store,
        load_raw=intrinsics.load_raw,
        decode=intrinsics.decode,
        load_vector=intrinsics.load_vector,
        store_vector=intrinsics.store_vector,
        load_index=intrinsics.load_index,
        exchange=lru_cache(lambda n: _shuffles(n, inlined)),
        shared_quad=intrinsics.shared_quad,
        fma=libdevice.fmaf,
        exp=libdevice.expf,
        log1p=libdevice.log1pf,
        rsqrt=libdevice.rsqrtf,
        divide=libdevice.fast_fdividef,
    )
