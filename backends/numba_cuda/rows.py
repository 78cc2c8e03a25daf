"""Rows of q, k and KDA's a on their way into registers: bits first, values and norms later.

A row is shared out among lanes in chunks of four, of which ``first``, ``first + step``, ... belong to one lane. Their
bits stay undecoded until they are used, so that nothing waits for a load before then.
"""

from __future__ import annotations

from typing import Any

from .target import Function, Target, quad_words
from .variant import CHUNK, ITEM, Variant

__all__ = ["fetch_row", "misaligned", "squares"]


def misaligned(variant: Variant, dtype: str) -> int:
    """Bits that must be 0 in the addresses and strides of rows whose chunks are to be single accesses.

    All of them where that is out of the question: no address is 0.
    """
    return CHUNK * ITEM[dtype] - 1 if variant.k % CHUNK == 0 and variant.strides != "any" else -1


def fetch_row(variant: Variant, target: Target, dtype: str, count: int, step: int) -> Function:
    """``(address, inner, aligned, first, raw, at)``: the bits of a lane's chunks to ``raw`` from ``at``.

    What lies beyond K is 0 and is not read. ``inner``: bytes between neighbours.
    """
    key_dim, chunk, words = variant.k, CHUNK, quad_words(dtype)
    load = target.load_raw_quad(dtype)
    all_k = variant.k == CHUNK * count * step
    possible = misaligned(variant, dtype) >= 0

    @target.device
    def fetch(address: Any, inner: Any, aligned: Any, first: Any, raw: Any, at: Any) -> Any:
        if possible and aligned:
            for p in range(count):
                k = chunk * (first + step * p)
                load(address + k * inner, inner, key_dim - k, all_k or k < key_dim, raw, at + words * p)
        else:
            for p in range(count):
                k = chunk * (first + step * p)
                load(address + k * inner, inner, key_dim - k, False, raw, at + words * p)

    return fetch


def squares(target: Target, count: int) -> Function:
    """``(values, sums) -> sum of squares`` over a lane's chunks, in the order of ``registers``; ``sums`` is scratch."""
    fma, chunk = target.fma, CHUNK
    stages = (count - 1).bit_length()

    @target.value
    def own_squares(values: Any, sums: Any) -> Any:
        for p in range(count):
            at = p * chunk
            x = values[at] * values[at]
            x = fma(values[at + 1], values[at + 1], x)
            x = fma(values[at + 2], values[at + 2], x)
            sums[p] = fma(values[at + 3], values[at + 3], x)
        for stage in range(stages):
            half = 1 << (stages - 1 - stage)
            for i in range(half):
                if half + i < count:
                    sums[i] += sums[half + i]
        return sums[0]

    return own_squares
