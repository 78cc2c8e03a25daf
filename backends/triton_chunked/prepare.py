"""All of a chunk that does not need the state: products of its keys and queries, gates, the triangular solve.

One program per (slot, value head). With ``D(t, s)`` the sum of log decays after s up to t, and beta:

    A(t, s) = beta_t sum_i k_t[i] exp(D(t, s)[i]) k_s[i]   for s < t        T = (I + A)^-1 diag(beta)
    P(t, s) = sum_i q_t[i] exp(D(t, s)[i]) k_s[i]          for s <= t

Where a head has one decay, D is a difference of sums in float64 and the products are those of k and q as they are. With
one for each key (KDA) it stands inside the sum, and no difference of sums from the chunk's start may be taken: neither
overflows, and a decay that lies before s must not cost the accuracy of what lies after. So the chunk is split:

    same 16 tokens     by distance: D grows by one token's decay a step, products element by element
    16 after 16, and   rows decay from the middle of their 32 (64) tokens, columns up to it; both factors are at most 1,
    32 after 32        and each is a sum of its own tokens' decays: one matrix product for all such pairs

Left to the scan, in float32 words: T ``[64, 64]``, P ``[64, 64]``; then of tokens what multiplies k and q where they
meet the state and where the state keeps k, ``[3, 64]``, and the chunk's decay; or with KDA those vectors themselves,
``[3, 64, KEYS]``, and the decays ``[KEYS]``.
"""

# The body of a Triton function is Triton's language: types are inferred, tuples grow by +, and a test of a constant
# stands alone and has its else, so that what it excludes is never compiled.
# ruff: noqa: ANN001, ANN201, ANN202, RET505, RUF005
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator, misc, unreachable"

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.gates import beta_of, log_decay_of
from .chunks import bounds_of, read_vectors, sequence_of
from .products import negative, pieces_of, product, transposed

__all__ = ["prepare"]

#: exp of less is zero in float32. Sums of log decays stay where their differences are accurate.
LEAST = tl.constexpr(-110.0)


@triton.jit
def _squares(vectors):
    """``[C]``: sums of squares over all pieces of the vectors."""
    total = tl.sum(vectors[0].to(tl.float32) * vectors[0].to(tl.float32), axis=1)
    for p in tl.static_range(1, len(vectors)):
        x = vectors[p].to(tl.float32)
        total += tl.sum(x * x, axis=1)
    return total


@triton.jit
def _logs_per_key(at, rows, there, stride_t, stride_d, bias, A_log, softplus_beta, softplus_threshold, lower_bound,
                  FIRST: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """``[C, WIDTH]`` log decays, zero for what is not there."""
    a = read_vectors(at, rows, there, stride_t, stride_d, FIRST, K, WIDTH).to(tl.float32)
    g = log_decay_of(a, bias[None, :], A_log, softplus_beta, softplus_threshold, lower_bound, BOUNDED)
    mask = there[:, None] & ((FIRST + tl.arange(0, WIDTH)) < K)[None, :]
    return tl.where(mask, tl.maximum(g, LEAST), 0.0)


@triton.jit
def _since(g, SEGMENT: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """``[C, WIDTH]``: sums of g from the start of each token's segment up to it, or from it up to the segment's end."""
    if SEGMENT == C:
        return tl.cumsum(g, axis=0, reverse=REVERSE)
    else:
        parts = tl.reshape(g, [C // SEGMENT, SEGMENT, WIDTH])
        return tl.reshape(tl.cumsum(parts, axis=1, reverse=REVERSE), [C, WIDTH])


@triton.jit
def _of_middle(g, later, places, HALF: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """``[C, WIDTH]`` factors: decay since the middle of the token's ``2 * HALF`` tokens, or up to it.

    ``later`` is g of the token after each one.
    """
    after = _since(g, HALF, C, WIDTH, False)
    before = _since(tl.where((places % HALF != HALF - 1)[:, None], later, 0.0), HALF, C, WIDTH, True)
    return tl.exp(tl.where((places // HALF % 2 == 1)[:, None], after, before))


@triton.jit
def _apart(kk, qk, keys, queries, logs, logs_at, HALF: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr,
           KEYS: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """``kk`` and ``qk`` with the pairs of tokens in the two halves of ``2 * HALF`` filled in."""
    places = tl.arange(0, C)
    following = tl.minimum(places + 1, C - 1)
    kk_all, qk_all = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for p in tl.static_range(len(keys)):
        inner = p * SPAN + tl.arange(0, SPAN)
        later = tl.load(logs_at + following[:, None] * KEYS + inner[None, :])
        factor = _of_middle(logs[p], later, places, HALF, C, SPAN)
        key = pieces_of(keys[p].to(tl.float32) * factor, PIECES)
        query = pieces_of(queries[p].to(tl.float32) * factor, PIECES)
        kk_all = kk_all - product(negative(key), transposed(key), C, C, PIECES)
        qk_all = qk_all - product(negative(query), transposed(key), C, C, PIECES)
    t, s = places[:, None], places[None, :]
    apart = (t // (2 * HALF) == s // (2 * HALF)) & (t // HALF > s // HALF)
    return tl.where(apart, kk_all, kk), tl.where(apart, qk_all, qk)


@triton.jit
def _invert_blocks(at, live, C: tl.constexpr, B: tl.constexpr):
    """Put the inverses of I + A in the places of A's blocks ``[B, B]`` on the diagonal, by substitution of rows.

    Rows from ``live`` on are zero.
    """
    block = tl.arange(0, C // B)[:, None, None]
    i, j = tl.arange(0, B)[None, :, None], tl.arange(0, B)[None, None, :]
    places = at + block * B * (C + 1) + i * C + j
    a = tl.load(places)
    x = tl.where(i == j, 1.0, tl.zeros([C // B, B, B], tl.float32))
    for t in range(1, tl.minimum(B, live)):
        row = tl.sum(tl.where(i == t, a, 0.0), axis=1)  # [blocks, B]: of A, by column
        new = tl.sum(row[:, :, None] * x, axis=1)
        x = tl.where(i == t, x - new[:, None, :], x)
    tl.debug_barrier()
    tl.store(places, x)


@triton.jit
def _invert_pairs(at, C: tl.constexpr, B: tl.constexpr, PIECES: tl.constexpr):
    """The same for blocks ``[2 B, 2 B]`` whose halves on the diagonal are inverted: what is below is ``-Y A X``."""
    places = tl.arange(0, B)[:, None] * C + tl.arange(0, B)[None, :]
    made = ()
    for pair in tl.static_range(C // (2 * B)):
        first = at + pair * 2 * B * (C + 1)
        x, y = tl.load(first + places), tl.load(first + B * (C + 1) + places)
        below = tl.load(first + B * C + places)
        right = product(pieces_of(below, PIECES), pieces_of(x, PIECES), B, B, PIECES)
        made = made + (-product(pieces_of(y, PIECES), pieces_of(right, PIECES), B, B, PIECES),)
    tl.debug_barrier()
    for pair in tl.static_range(C // (2 * B)):
        tl.store(at + pair * 2 * B * (C + 1) + B * C + places, made[pair])


@triton.jit
def _solve(at, beta, live, C: tl.constexpr, B: tl.constexpr, PIECES: tl.constexpr):
    """Put ``(I + A)^-1 diag(beta)`` in A's place ``[C, C]``, which is zero from the diagonal on and from ``live``."""
    tl.debug_barrier()
    _invert_blocks(at, live, C, B)
    if live > B:
        tl.debug_barrier()
        _invert_pairs(at, C, B, PIECES)
        tl.debug_barrier()
        _invert_pairs(at, C, 2 * B, PIECES)
    tl.debug_barrier()
    places = at + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(places, tl.load(places) * beta[None, :])


@triton.jit(do_not_specialize=["N", "T", "HV", "a_b", "g_t", "b_b", "b_t"])
def prepare(
    q, k, a, b, A_log, dt_bias, offsets, workspace,
    scale, softplus_beta, softplus_threshold, lower_bound,
    N, T, HV, q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, a_b, a_t, a_h, a_d, g_t, b_b, b_t, b_h, A_h, dt_h, dt_d,
    GROUP: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr, C: tl.constexpr, RECORD: tl.constexpr,
    IN: tl.constexpr, PIECES: tl.constexpr, KDA: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr,
    NEG_EIGVAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Program ``slot * HV + value head`` along x. Strides as the recurrent kernel's; see ``arguments`` for the rest.

    ``IN`` and ``PIECES``: bfloat16 that stand for an element of q and k, and for a float32. ``SPAN`` keys at a time.
    """
    B: tl.constexpr = 16
    SPANS: tl.constexpr = (K + SPAN - 1) // SPAN
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // HV, program % HV
    if VARLEN:
        n = sequence_of(slot, offsets, N, C, 128).to(tl.int64)
        first, length, batch = bounds_of(n, offsets, T, True)
        token = (slot - (first // C + n)) * C
    else:
        per = (T + C - 1) // C
        n = slot // per
        first, length, batch = bounds_of(n, offsets, T, False)
        token = (slot - n * per) * C
    if token >= length:
        return
    group = head // GROUP
    places = tl.arange(0, C)
    rows = first + token + places
    there = token + places < length
    live = tl.minimum(length - token, C).to(tl.int32)

    record = workspace + (slot * HV + head) * RECORD
    T_at, P_at, vectors_at = record, record + C * C, record + 2 * C * C
    q_at = q + batch * q_b + group * q_h
    k_at = k + batch * k_b + group * k_h
    b_at = b + batch * b_b + head * b_h
    log_scale = tl.load(A_log + head * A_h).to(tl.float32)
    beta = beta_of(tl.load(b_at + rows * b_t, mask=there, other=0.0).to(tl.float32), NEG_EIGVAL)
    beta = tl.where(there, beta, 0.0)

    keys, queries = (), ()
    for p in tl.static_range(SPANS):
        keys = keys + (read_vectors(k_at, rows, there, k_t, k_d, p * SPAN, K, SPAN),)
        queries = queries + (read_vectors(q_at, rows, there, q_t, q_d, p * SPAN, K, SPAN),)
    if L2NORM:
        key_norm = tl.rsqrt(_squares(keys) + 1e-6)
        query_norm = tl.rsqrt(_squares(queries) + 1e-6) * scale
    else:
        key_norm = tl.full([C], 1.0, tl.float32)
        query_norm = tl.zeros([C], tl.float32) + scale

    square = places[:, None] * C + places[None, :]
    near = tl.zeros([C, C], tl.float32)
    kk, qk = near, near
    if KDA:
        kept_at = vectors_at + 2 * C * KEYS  # k as the state keeps it; the log decays until that is known
        a_at = a + batch * a_b + head * a_h
        logs, sums = (), ()
        for p in tl.static_range(SPANS):
            inner = p * SPAN + tl.arange(0, SPAN)
            bias = tl.load(dt_bias + head * dt_h + inner * dt_d, mask=inner < K, other=0.0).to(tl.float32)
            g = _logs_per_key(a_at, rows, there, a_t, a_d, bias, log_scale, softplus_beta, softplus_threshold,
                              lower_bound, p * SPAN, K, SPAN, BOUNDED)  # fmt: skip
            logs = logs + (g,)
            sums = sums + (tl.zeros([C, SPAN], tl.float32),)
            tl.store(kept_at + places[:, None] * KEYS + inner[None, :], g)
        tl.debug_barrier()
        # Pairs of the same 16 tokens: column t - distance of row t.
        for distance in range(tl.minimum(B, live)):
            inside = places % B >= distance
            back = tl.where(inside, places - distance, places)
            kk_here, qk_here = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
            grown = ()
            for p in tl.static_range(SPANS):
                inner = p * SPAN + tl.arange(0, SPAN)
                other = read_vectors(k_at, first + token + back, there & inside, k_t, k_d, p * SPAN, K, SPAN)
                decayed = other.to(tl.float32) * tl.exp(sums[p])
                kk_here += tl.sum(keys[p].to(tl.float32) * decayed, axis=1)
                qk_here += tl.sum(queries[p].to(tl.float32) * decayed, axis=1)
                g = tl.load(kept_at + back[:, None] * KEYS + inner[None, :])
                grown = grown + (sums[p] + g,)
            sums = grown
            tl.store(T_at + places * C + back, kk_here, mask=inside)
            tl.store(P_at + places * C + back, qk_here, mask=inside)
        # Then 16 tokens after 16, and 32 after 32.
        if live > B:
            kk, qk = _apart(kk, qk, keys, queries, logs, kept_at, B, C, SPAN, KEYS, PIECES)
            kk, qk = _apart(kk, qk, keys, queries, logs, kept_at, 2 * B, C, SPAN, KEYS, PIECES)
        tl.debug_barrier()
        same = (places[:, None] // B == places[None, :] // B) & (places[:, None] >= places[None, :])
        same = same & there[:, None]
        kk = tl.where(same, tl.load(T_at + square, mask=same, other=0.0), kk)
        qk = tl.where(same, tl.load(P_at + square, mask=same, other=0.0), qk)
        tl.debug_barrier()
        for p in tl.static_range(SPANS):
            inner = p * SPAN + tl.arange(0, SPAN)
            at = places[:, None] * KEYS + inner[None, :]
            since = tl.cumsum(logs[p], axis=0)
            later = tl.load(kept_at + tl.minimum(places + 1, C - 1)[:, None] * KEYS + inner[None, :])
            left = tl.cumsum(tl.where((places != C - 1)[:, None], later, 0.0), axis=0, reverse=True)
            key = keys[p].to(tl.float32) * key_norm[:, None]
            tl.store(vectors_at + at, key * tl.exp(since))
            tl.store(vectors_at + C * KEYS + at, queries[p].to(tl.float32) * query_norm[:, None] * tl.exp(since))
            tl.store(vectors_at + 3 * C * KEYS + inner, tl.exp(tl.sum(logs[p], axis=0)))
            tl.debug_barrier()  # the log decays of these keys have been read
            tl.store(kept_at + at, key * tl.exp(left))
    else:
        for p in tl.static_range(SPANS):
            key = pieces_of(keys[p], IN)
            kk = kk - product(negative(key), transposed(key), C, C, PIECES)
            qk = qk - product(negative(pieces_of(queries[p], IN)), transposed(key), C, C, PIECES)
        bias = tl.load(dt_bias + head * dt_h).to(tl.float32)
        inputs = tl.load(a + batch * a_b + head * a_h + rows * g_t, mask=there, other=0.0).to(tl.float32)
        g = log_decay_of(inputs, bias, log_scale, softplus_beta, softplus_threshold, lower_bound, BOUNDED)
        sums = tl.cumsum(tl.where(there, tl.maximum(g, LEAST), 0.0).to(tl.float64), axis=0)
        total = tl.sum(tl.where(places == C - 1, sums, 0.0), axis=0)
        since, left = tl.exp(sums.to(tl.float32)), tl.exp((total - sums).to(tl.float32))
        past = tl.exp(tl.minimum(sums[:, None] - sums[None, :], 0.0).to(tl.float32))
        kk, qk = kk * past, qk * past
        tl.store(vectors_at + places, since * key_norm)
        tl.store(vectors_at + C + places, since * query_norm)
        tl.store(vectors_at + 2 * C + places, left * key_norm)
        tl.store(vectors_at + 3 * C, tl.exp(total.to(tl.float32)))

    lower = places[:, None] > places[None, :]
    tl.store(T_at + square, tl.where(lower, kk * (beta * key_norm)[:, None] * key_norm[None, :], 0.0))
    upto = places[:, None] >= places[None, :]
    tl.store(P_at + square, tl.where(upto, qk * query_norm[:, None] * key_norm[None, :], 0.0))
    _solve(T_at, beta, live, C, B, PIECES)
