"""Target: the operations a kernel is written in. Numba's CUDA compiler has one set, an engine on a CPU another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

__all__ = ["Function", "Target", "gpu", "quad_words"]

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Target:
    """What kernel factories build on. Addresses are integers, values float32, however they are stored.

    Attributes:
        device: decorator of functions without result that use CUDA features (shuffles, barriers, memory).
        pure: decorator of functions without result, of scalars and arrays alone.
        value: decorator of functions of scalars and arrays alone whose result is a float32. index: an integer.
        load, store: ``load(dtype)(address)`` and ``store(dtype)(address, value)``; stores round to nearest even.
        load_raw, decode: ``decode(dtype)(load_raw(dtype)(address))`` is ``load(dtype)(address)``; the uint32 in between
            may still be under way while other work is done.
        load_raw_quad, decode_quad: the same for four neighbours: ``load_raw_quad(dtype)(address, inner, count, aligned,
            raw, at)`` fills ``quad_words(dtype)`` elements of an array of uint32 from ``at``; ``count`` of the four
            exist, ``inner`` bytes apart, the others are 0. If ``aligned`` all do, in one access aligned to it.
            ``decode_quad(dtype)(raw, at, out, first)`` makes ``out[first : first + 4]`` of them.
        load_vector, store_vector: ``load_vector(dtype, n, streaming)(address, out, first, step)`` loads ``n`` values
            into ``out[first::step]``, ``store_vector`` does the reverse; addresses are aligned to
            ``min(16, n * itemsize)`` bytes. Streaming: nobody will want these lines soon.
        load_index: ``(address, wide)``: an int32, or where ``wide`` an int64, as an integer.
        exchange: ``exchange(n)(values, mask, out)``: ``n`` values of the lane whose number differs in ``mask``.
        read_quad, write_quad: ``(array, at, registers, first)``: four values between a shared float32 array, from
            ``at``, a multiple of four, and ``registers[first : first + 4]``.
        read_one: ``(array, at)``: a value of a shared float32 array.
        pin: ``(integer)``: the same, to be computed here and not where it is used.
        fma: ``(x, y, z)``: ``x * y + z`` rounded once. exp, log1p: within 2 ulp. rsqrt: within 2 ulp.
        divide: within 2 ulp, exact by 1, for divisors up to 2**126.
    """

    device: Callable[[Function], Function]
    pure: Callable[[Function], Function]
    value: Callable[[Function], Function]
    index: Callable[[Function], Function]
    load: Callable[[str], Function]
    store: Callable[[str], Function]
    load_raw: Callable[[str], Function]
    decode: Callable[[str], Function]
    load_raw_quad: Callable[[str], Function]
    decode_quad: Callable[[str], Function]
    load_vector: Callable[[str, int, bool], Function]
    store_vector: Callable[[str, int, bool], Function]
    load_index: Function
    exchange: Callable[[int], Function]
    read_quad: Function
    write_quad: Function
    read_one: Function
    pin: Function
    fma: Function
    exp: Function
    log1p: Function
    rsqrt: Function
    divide: Function


def quad_words(dtype: str) -> int:
    """How many uint32 the bits of four values take."""
    return 4 if dtype == "float32" else 2


@lru_cache(maxsize=1)
def gpu() -> Target:
    """Numba's CUDA compiler. Nothing here needs a GPU to be present."""
    from numba.cuda import libdevice

    from . import intrinsics, routines

    return Target(
        device=routines.routine,
        pure=routines.routine,
        value=routines.value,
        index=routines.index,
        load=intrinsics.load,
        store=intrinsics.store,
        load_raw=intrinsics.load_raw,
        decode=intrinsics.decode,
        load_raw_quad=intrinsics.load_raw_quad,
        decode_quad=intrinsics.decode_quad,
        load_vector=intrinsics.load_vector,
        store_vector=intrinsics.store_vector,
        load_index=intrinsics.load_index,
        exchange=routines.exchange,
        read_quad=intrinsics.read_quad,
        write_quad=intrinsics.write_quad,
        read_one=intrinsics.read_one,
        pin=intrinsics.pin,
        fma=libdevice.fmaf,
        exp=libdevice.expf,
        log1p=libdevice.log1pf,
        rsqrt=libdevice.rsqrtf,
        divide=libdevice.fast_fdividef,
    )
