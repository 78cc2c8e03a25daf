"""How K lies in a tile: pieces of SPAN keys, and sums over them whose order nothing can change.

A state tile ``[BV, K]`` is held as ``ceil(K / SPAN)`` tensors ``[BV, SPAN]``, a tuple, so a K that is no power of two
wastes nothing. SPAN is 32 or 16 (less for a K below that). Whichever it is, a sum over K is made in one order:

    1. for each i < 32, one chain of ``fma`` over the keys i, i + 32, i + 64, ...
    2. the 32 results in pairs, by the bits of i: neighbours (bit 0), then bit 1, then bit 4, then bits 2 and 3.

Each addition names its two operands, so neither the tile, the span, the number of warps, the state's layout nor the
alignment of a pointer changes a bit: they only decide which lane adds. With SPAN 16 the chains of i and of i + 16 are
two tensors, added to one another as bit 4. Keys beyond K are zeros and add nothing.

LANES is how many lanes lie along a span. With K contiguous in memory (layout ``vk``) it is SPAN and position p holds
key p. With V contiguous (``kv``) the compiler deals the positions out to lanes one by one, so position ``p`` holds key
``(p % LANES) * (SPAN // LANES) + p // LANES``: what is added first then lies in one lane's registers. ORDER says which
bit of the position each step adds over, three bits a step (see ``arguments.order_of_sums``).

Vectors over K are read in memory's order and, where they have 16 bits, kept in pairs as 32-bit words until they are
used: one register for two values, also across iterations of a loop.
"""

# The body of a Triton function is Triton's language: types are inferred, tuples grow by +, and a test of a constant
# stands alone and has its else, so that what it excludes is never compiled.
# ruff: noqa: ANN001, ANN201, ANN202, RET505, RUF005, SIM108, SIM300
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "dot_over_k",
    "load_pieces",
    "load_tile",
    "placed",
    "read_pieces",
    "read_rows",
    "square_norm",
    "square_norms",
    "store_tile",
]


@triton.jit
def _span_keys(SPAN: tl.constexpr, LANES: tl.constexpr):
    """``[SPAN]`` int64: the key at each position of a piece."""
    p = tl.arange(0, SPAN).to(tl.int64)
    if LANES == SPAN:
        return p
    return (p % LANES) * (SPAN // LANES) + p // LANES


@triton.jit
def _paired(x, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """``[ROWS, SPAN / 2]`` words, the even value low, from ``[ROWS, SPAN]`` of 16 bits; wider values as they are."""
    if (x.dtype.primitive_bitwidth == 16) and (SPAN > 1):
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
        even, odd = tl.split(tl.reshape(bits, [ROWS, SPAN // 2, 2]))
        return even | (odd << 16)
    else:
        return x


@triton.jit
def _even_odd(words, TYPE: tl.constexpr):
    """The two values of each word in float32."""
    if TYPE == tl.bfloat16:
        return (words << 16).to(tl.float32, bitcast=True), (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        even, odd = (words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16)
        return even.to(TYPE, bitcast=True).to(tl.float32), odd.to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def _in_order(x, SPAN: tl.constexpr, LANES: tl.constexpr):
    """``[SPAN]`` values read in memory's order, put at their positions."""
    if LANES == SPAN:
        return tl.reshape(x, [SPAN])
    else:
        return tl.reshape(tl.trans(tl.reshape(x, [LANES, SPAN // LANES])), [SPAN])


@triton.jit
def _read(base, stride, FIRST: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr):
    """``[SPAN]`` values of a vector over K, zero beyond it."""
    i = FIRST + tl.arange(0, SPAN).to(tl.int64)
    if FIRST + SPAN <= K:
        return tl.load(base + i * stride)
    else:
        return tl.load(base + i * stride, mask=i < K, other=0.0)


@triton.jit
def load_pieces(base, stride, K: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr):
    """A vector over K as float32 ``[SPAN]`` each, at the positions of a tile; zero beyond K."""
    pieces = ()
    for first in tl.static_range(0, K, SPAN):
        pieces = pieces + (_in_order(_read(base, stride, first, K, SPAN), SPAN, LANES).to(tl.float32),)
    return pieces


@triton.jit
def read_pieces(base, stride, K: tl.constexpr, SPAN: tl.constexpr):
    """A vector over K as it is kept until it is used, for :func:`placed`; zero beyond K."""
    pieces = ()
    for first in tl.static_range(0, K, SPAN):
        pieces = pieces + (_paired(tl.reshape(_read(base, stride, first, K, SPAN), [1, SPAN]), 1, SPAN),)
    return pieces


@triton.jit
def placed(pieces, TYPE: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr):
    """What :func:`read_pieces` read of a tensor of TYPE, as float32 ``[SPAN]`` each, at the positions of a tile."""
    moved = ()
    for i in tl.static_range(len(pieces)):
        if (TYPE.primitive_bitwidth == 16) and (SPAN > 1):
            even, odd = _even_odd(pieces[i], TYPE)
            x = tl.join(even, odd)
        else:
            x = pieces[i].to(tl.float32)
        moved = moved + (_in_order(x, SPAN, LANES),)
    return moved


@triton.jit
def read_rows(at, stride, ROWS: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr):
    """Vectors over K that begin at ``at [ROWS]``, as a tuple of pieces, zero beyond K, for :func:`square_norms`."""
    pieces = ()
    keys = tl.arange(0, SPAN).to(tl.int64)
    for first in tl.static_range(0, K, SPAN):
        here = at[:, None] + (first + keys)[None, :] * stride
        if first + SPAN <= K:
            x = tl.load(here)
        else:
            x = tl.load(here, mask=(first + keys < K)[None, :], other=0.0)
        pieces = pieces + (_paired(x, ROWS, SPAN),)
    return pieces


@triton.jit
def load_tile(base, stride_k, stride_v, rows, live, K: tl.constexpr, V: tl.constexpr,
              BV: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, STREAM: tl.constexpr):  # fmt: skip
    """A state's rows ``[BV]`` of V as float32 pieces ``[BV, SPAN]``; zero where not ``live`` (a scalar), or outside.

    With STREAM the first level of cache keeps none of it.
    """
    PAST: tl.constexpr = ".cg" if STREAM else ""
    tile = ()
    keys = _span_keys(SPAN, LANES)
    at = base + rows[:, None] * stride_v + keys[None, :] * stride_k
    for first in tl.static_range(0, K, SPAN):
        mask = tl.full([BV, SPAN], True, tl.int1) & live
        if V % BV != 0:
            mask = mask & (rows < V)[:, None]
        if first + SPAN > K:
            mask = mask & (first + keys < K)[None, :]
        x = tl.load(at + first * stride_k, mask=mask, other=0.0, cache_modifier=PAST)
        tile = tile + (x.to(tl.float32),)
    return tile


@triton.jit
def store_tile(tile, base, stride_k, stride_v, rows, K: tl.constexpr, V: tl.constexpr,
               BV: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, STREAM: tl.constexpr):  # fmt: skip
    """The reverse of :func:`load_tile`, rounding to nearest even in the dtype behind ``base``.

    With STREAM caches give its lines up first.
    """
    PAST: tl.constexpr = ".cs" if STREAM else ""
    keys = _span_keys(SPAN, LANES)
    at = base + rows[:, None] * stride_v + keys[None, :] * stride_k
    for first in tl.static_range(0, K, SPAN):
        x = tile[first // SPAN].to(base.dtype.element_ty)
        mask = tl.full([BV, SPAN], True, tl.int1)
        if V % BV != 0:
            mask = mask & (rows < V)[:, None]
        if first + SPAN > K:
            mask = mask & (first + keys < K)[None, :]
        if (V % BV != 0) or (first + SPAN > K):
            tl.store(at + first * stride_k, x, mask=mask, cache_modifier=PAST)
        else:
            tl.store(at + first * stride_k, x, cache_modifier=PAST)


@triton.jit
def _add_pairs(x, ROWS: tl.constexpr, SPAN: tl.constexpr, ORDER: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Steps FIRST to LAST - 1 of the sum over a span: each halves the last dimension of ``x``."""
    for step in tl.static_range(FIRST, LAST):
        x = tl.reshape(
            x, [ROWS, (SPAN >> (step + 1)) >> ((ORDER >> (3 * step)) & 7), 2, 1 << ((ORDER >> (3 * step)) & 7)]
        )
        x = tl.reshape(tl.sum(x, axis=2), [ROWS, SPAN >> (step + 1)])
    return x


@triton.jit
def sum_over_k(even, odd, ROWS: tl.constexpr, SPAN: tl.constexpr, ORDER: tl.constexpr, LEVELS: tl.constexpr,
               TWO: tl.constexpr):  # fmt: skip
    """``[ROWS]`` from the chains ``[ROWS, SPAN]``: of all pieces, or with TWO of the even and of the odd ones."""
    if TWO:
        left = _add_pairs(even, ROWS, SPAN, ORDER, 0, 2)
        right = _add_pairs(odd, ROWS, SPAN, ORDER, 0, 2)
        return tl.reshape(_add_pairs(left + right, ROWS, SPAN, ORDER, 2, LEVELS), [ROWS])
    return tl.reshape(_add_pairs(even, ROWS, SPAN, ORDER, 0, LEVELS), [ROWS])


@triton.jit
def dot_over_k(tile, vector, BV: tl.constexpr, SPAN: tl.constexpr, ORDER: tl.constexpr, LEVELS: tl.constexpr,
               TWO: tl.constexpr):  # fmt: skip
    """``[BV]``: the tile's rows times the vector."""
    even = tile[0] * vector[0][None, :]
    odd = even
    if TWO:
        odd = tile[1] * vector[1][None, :]
    for i in tl.static_range(2 if TWO else 1, len(tile)):
        x = tl.broadcast_to(vector[i][None, :], [BV, SPAN])
        if TWO and i % 2 == 1:
            odd = tl.fma(tile[i], x, odd)
        else:
            even = tl.fma(tile[i], x, even)
    return sum_over_k(even, odd, BV, SPAN, ORDER, LEVELS, TWO)


@triton.jit
def square_norm(vector, SPAN: tl.constexpr, ORDER: tl.constexpr, LEVELS: tl.constexpr, TWO: tl.constexpr):
    """``[1]``: the vector times itself."""
    even = vector[0] * vector[0]
    odd = even
    if TWO:
        odd = vector[1] * vector[1]
    for i in tl.static_range(2 if TWO else 1, len(vector)):
        if TWO and i % 2 == 1:
            odd = tl.fma(vector[i], vector[i], odd)
        else:
            even = tl.fma(vector[i], vector[i], even)
    return sum_over_k(tl.reshape(even, [1, SPAN]), tl.reshape(odd, [1, SPAN]), 1, SPAN, ORDER, LEVELS, TWO)


@triton.jit
def square_norms(rows, TYPE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, LEVELS: tl.constexpr):
    """``[ROWS]``: as :func:`square_norm` and to the same bits, of what :func:`read_rows` read.

    SPAN is all 32 chains, or the power of two that covers a smaller K; LEVELS is its logarithm.
    """
    ORDER: tl.constexpr = (2 << 6) if SPAN == 32 else 0  # bit 4 before 2 and 3
    if (TYPE.primitive_bitwidth == 16) and (SPAN > 1):
        x, y = _even_odd(rows[0], TYPE)
        even, odd = x * x, y * y
        for i in tl.static_range(1, len(rows)):
            x, y = _even_odd(rows[i], TYPE)
            even, odd = tl.fma(x, x, even), tl.fma(y, y, odd)
        return tl.reshape(_add_pairs(even + odd, ROWS, SPAN, ORDER, 1, LEVELS), [ROWS])
    else:
        x = rows[0].to(tl.float32)
        total = x * x
        for i in tl.static_range(1, len(rows)):
            x = rows[i].to(tl.float32)
            total = tl.fma(x, x, total)
        return tl.reshape(_add_pairs(total, ROWS, SPAN, ORDER, 0, LEVELS), [ROWS])
