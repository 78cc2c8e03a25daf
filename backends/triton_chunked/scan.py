"""The state's way through the chunks of a sequence, and the outputs on it.

One program per (tile of V, value head, sequence). S ``[K, V]`` is the state at a chunk's start, T and P are of prepare:

    R = V - K' S      U = T R      O = Q' S + P U      S <- decay S + K''^T U

K' and Q' are k and q decayed from the chunk's start, K'' is k decayed up to its end. Where a head has one decay they
are q and k as they came, times a factor of each token.

There products are taken of -q and -k, and the factors are negative. What a Triton program computes is a product's left
factor in registers; what it loads goes through shared memory, and of so many descriptors as are here ptxas 12.8 keeps
some wrong: the outputs of all but the first 16 tokens were wrong on an H100, and compute-sanitizer saw reads outside.
"""

# The body of a Triton function is Triton's language: types are inferred, tuples grow by +, and a test of a constant
# stands alone and has its else, so that what it excludes is never compiled.
# ruff: noqa: ANN001, ANN201, ANN202, RUF005, SIM108
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .chunks import bounds_of, read_vectors
from .products import negative, pieces_of, product, transposed

__all__ = ["scan"]


@triton.jit
def _state_at(base, rows, stride_k, stride_v, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    keys = FIRST + tl.arange(0, WIDTH).to(tl.int64)
    return base + keys[:, None] * stride_k + rows[None, :] * stride_v


@triton.jit
def _state_mask(rows, K: tl.constexpr, V: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    return ((FIRST + tl.arange(0, WIDTH)) < K)[:, None] & (rows < V)[None, :]


@triton.jit(do_not_specialize=["N", "T", "HV"])
def scan(
    q, k, v, out, pool, read_slots, write_slots, offsets, workspace,
    N, T, HV, q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, o_b, o_t, o_h, o_d,
    pool_s, pool_h, pool_k, pool_v,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    KEYS: tl.constexpr, C: tl.constexpr, RECORD: tl.constexpr, IN: tl.constexpr, PIECES: tl.constexpr,
    KDA: tl.constexpr, VARLEN: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Program ``head * tiles + tile`` along x of sequence ``z * programs along y + y``.

    Strides as the recurrent kernel's. ``SPAN`` keys of the state at a time; ``KEYS``: of a vector in the workspace.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    SPANS: tl.constexpr = (K + SPAN - 1) // SPAN
    place = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if place >= N:
        return
    n = place.to(tl.int64)
    program = tl.program_id(0)
    head = (program // TILES).to(tl.int64)
    group = head // GROUP
    rows = ((program % TILES) * BV + tl.arange(0, BV)).to(tl.int64)
    first, length, batch = bounds_of(n, offsets, T, VARLEN)
    if length <= 0:
        return
    if VARLEN:
        slot = first // C + n
    else:
        slot = n * ((T + C - 1) // C)

    state = ()
    if READ:
        read = tl.load(read_slots + n).to(tl.int64)
        start = pool + tl.maximum(read, 0) * pool_s + head * pool_h
        for p in tl.static_range(SPANS):
            inside = _state_mask(rows, K, V, p * SPAN, SPAN) & (read >= 0)
            at = _state_at(start, rows, pool_k, pool_v, p * SPAN, SPAN)
            state = state + (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    else:
        for _ in tl.static_range(SPANS):
            state = state + (tl.zeros([SPAN, BV], tl.float32),)

    places = tl.arange(0, C)
    square = places[:, None] * C + places[None, :]
    q_at = q + batch * q_b + group * q_h
    k_at = k + batch * k_b + group * k_h
    v_at = v + batch * v_b + head * v_h
    o_at = out + batch * o_b + head * o_h
    for chunk in range((length.to(tl.int32) + C - 1) // C):
        token = chunk * C
        record = workspace + ((slot + chunk) * HV + head) * RECORD
        vectors_at = record + 2 * C * C
        there = token + places < length
        tokens = first + token + places
        mask = there[:, None] & (rows < V)[None, :]
        values = tl.load(v_at + tokens[:, None] * v_t + rows[None, :] * v_d, mask=mask, other=0.0)

        seen, shown = tl.zeros([C, BV], tl.float32), tl.zeros([C, BV], tl.float32)
        for p in tl.static_range(SPANS):
            held = pieces_of(state[p], PIECES)
            if KDA:
                inner = p * SPAN + tl.arange(0, SPAN)
                vector = vectors_at + places[:, None] * KEYS + inner[None, :]
                key, query = pieces_of(tl.load(vector), PIECES), pieces_of(tl.load(vector + C * KEYS), PIECES)
            else:
                key = negative(pieces_of(read_vectors(k_at, tokens, there, k_t, k_d, p * SPAN, K, SPAN), IN))
                query = negative(pieces_of(read_vectors(q_at, tokens, there, q_t, q_d, p * SPAN, K, SPAN), IN))
            seen += product(key, held, C, BV, PIECES)
            shown += product(query, held, C, BV, PIECES)
        if not KDA:
            seen *= -tl.load(vectors_at + places)[:, None]
            shown *= -tl.load(vectors_at + C + places)[:, None]

        # What is needed late is read late: held meanwhile, it would push the state out of the registers.
        solved = pieces_of(tl.load(record + square), PIECES)
        written = product(solved, pieces_of(values.to(tl.float32) - seen, PIECES), C, BV, PIECES)
        past = pieces_of(tl.load(record + C * C + square), PIECES)
        o = shown + product(past, pieces_of(written, PIECES), C, BV, PIECES)
        tl.store(o_at + tokens[:, None] * o_t + rows[None, :] * o_d, o.to(out.dtype.element_ty), mask=mask)

        new = ()
        if KDA:
            kept = pieces_of(written, PIECES)
            for p in tl.static_range(SPANS):
                decay = tl.load(vectors_at + 3 * C * KEYS + p * SPAN + tl.arange(0, SPAN))
                vector = vectors_at + 2 * C * KEYS + places[:, None] * KEYS + (p * SPAN + tl.arange(0, SPAN))[None, :]
                added = product(transposed(pieces_of(tl.load(vector), PIECES)), kept, SPAN, BV, PIECES)
                new = new + (tl.fma(state[p], tl.broadcast_to(decay[:, None], [SPAN, BV]), added),)
        else:
            decay = tl.load(vectors_at + 3 * C)
            kept = pieces_of(written * -tl.load(vectors_at + 2 * C + places)[:, None], PIECES)
            for p in tl.static_range(SPANS):
                key = negative(pieces_of(read_vectors(k_at, tokens, there, k_t, k_d, p * SPAN, K, SPAN), IN))
                added = product(transposed(key), kept, SPAN, BV, PIECES)
                new = new + (tl.fma(state[p], tl.zeros([SPAN, BV], tl.float32) + decay, added),)
        state = new

    if WRITE:
        write = tl.load(write_slots + n).to(tl.int64)
        if write >= 0:
            end = pool + write * pool_s + head * pool_h
            for p in tl.static_range(SPANS):
                at = _state_at(end, rows, pool_k, pool_v, p * SPAN, SPAN)
                tl.store(at, state[p].to(pool.dtype.element_ty), mask=_state_mask(rows, K, V, p * SPAN, SPAN))
