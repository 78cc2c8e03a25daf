"""Where a chunk lies: from its slot to the sequence, and what every kernel reads of it."""

# ruff: noqa: ANN001, ANN201, RET505
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["bounds_of", "read_vectors", "sequence_of"]


@triton.jit
def sequence_of(slot, offsets, N, C: tl.constexpr, WIDTH: tl.constexpr):
    """The sequence whose chunks' slots begin last at or before ``slot``: those of n at ``offsets[n] // C + n``.

    Every sequence has a slot more than it needs at most, so neither lengths nor their sums are looked up.
    """
    before = tl.zeros([], tl.int32)
    for at in range(0, N, WIDTH):
        n = at + tl.arange(0, WIDTH)
        first = tl.load(offsets + n, mask=n < N, other=0).to(tl.int64) // C + n
        before += tl.sum(((first <= slot) & (n < N)).to(tl.int32), axis=0)
    return before - 1


@triton.jit
def bounds_of(n, offsets, T, VARLEN: tl.constexpr):
    """Of sequence n: its first row among the tokens (of its batch row), its length, its batch row; 64 bits."""
    if VARLEN:
        first = tl.load(offsets + n).to(tl.int64)
        return first, tl.load(offsets + n + 1).to(tl.int64) - first, n * 0
    else:
        return n * 0, n * 0 + T, n


@triton.jit
def read_vectors(at, rows, there, stride_t, stride_d, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """``[C, WIDTH]`` of the vectors of tokens ``rows`` that are ``there``: from component FIRST on; else zero."""
    inner = FIRST + tl.arange(0, WIDTH).to(tl.int64)
    mask = there[:, None]
    if FIRST + WIDTH > SIZE:
        mask = mask & (inner < SIZE)[None, :]
    return tl.load(at + rows[:, None] * stride_t + inner[None, :] * stride_d, mask=mask, other=0.0)
