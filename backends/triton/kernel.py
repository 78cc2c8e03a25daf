"""The recurrent kernel: one program keeps BV rows of one head's state in registers through a whole sequence.

    S = exp(g) * S;   u = beta * (v - S^T k);   S = S + k u^T;   o = S^T q

Nothing of the state touches memory between a sequence's first and last token. What depends on the state, and so cannot
be started early, is short: the sum over K of ``S k``, ``u``, and the update. The decay, the norms and the scale are
scalars that multiply sums instead of vectors, and the next tokens' q, k, v and gates are read DEPTH tokens ahead.
"""

# The body of a Triton function is Triton's language: types are inferred, tuples grow by +, and a test of a constant
# stands alone, so that what it excludes is never compiled.
# ruff: noqa: ANN001, ANN201, ANN202, PLR5501, RUF005, SIM102, SIM108
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .gates import beta_of, decay_of
from .tiles import dot_over_k, load_pieces, load_tile, square_norm, store_tile

__all__ = ["recurrent"]


@triton.jit
def _load_token(row, q, k, v, a, b, q_t, q_d, k_t, k_d, v_t, v_d, a_t, a_d, b_t, rows,
                K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr,
                KDA: tl.constexpr):  # fmt: skip
    """One token's k, q, v, a, b as they are stored; pointers are at this head's first row, strides by token."""
    keys = load_pieces(k + row * k_t, k_d, K, SPAN, LANES)
    queries = load_pieces(q + row * q_t, q_d, K, SPAN, LANES)
    if V % BV == 0:
        values = tl.load(v + row * v_t + rows * v_d)
    else:
        values = tl.load(v + row * v_t + rows * v_d, mask=rows < V, other=0.0)
    if KDA:
        gates = load_pieces(a + row * a_t, a_d, K, SPAN, LANES)
    else:
        gates = (tl.load(a + row * a_t),)
    return (keys, queries, values, gates, tl.load(b + row * b_t))


@triton.jit
def _in_float32(pieces):
    converted = ()
    for i in tl.static_range(len(pieces)):
        converted = converted + (pieces[i].to(tl.float32),)
    return converted


@triton.jit
def _prepare(token, biases, A_log, scale, softplus_beta, softplus_threshold, lower_bound,
             SPAN: tl.constexpr, ORDER: tl.constexpr, LEVELS: tl.constexpr, TWO: tl.constexpr,
             BOUNDED: tl.constexpr, L2NORM: tl.constexpr, NEG_EIGVAL: tl.constexpr):  # fmt: skip
    """All that can be said of a token without the state.

    Returns k and q as stored but in float32, v, the decay (a tuple: one scalar, or a vector per piece of K), beta,
    and what sums with k and with q are multiplied by: their inverse norms, the latter times the scale.
    """
    keys, queries, values, gates, b = token
    key, query = _in_float32(keys), _in_float32(queries)
    decays = ()
    for i in tl.static_range(len(gates)):
        x = gates[i].to(tl.float32)
        decays = decays + (decay_of(x, biases[i], A_log, softplus_beta, softplus_threshold, lower_bound, BOUNDED),)
    if L2NORM:
        # 1 / sqrt(sum(x * x) + 1e-6): the epsilon inside.
        key_factor = tl.rsqrt(square_norm(key, SPAN, ORDER, LEVELS, TWO) + 1e-6)
        query_factor = tl.rsqrt(square_norm(query, SPAN, ORDER, LEVELS, TWO) + 1e-6) * scale
    else:
        key_factor = tl.full([1], 1.0, tl.float32)
        query_factor = tl.zeros([1], tl.float32) + scale
    beta = beta_of(b.to(tl.float32), NEG_EIGVAL)
    return (key, query, values.to(tl.float32), decays, beta, key_factor, query_factor)


@triton.jit
def _scaled(tile, decays, KDA: tl.constexpr):
    """``exp(g) * S``."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        if KDA:
            scaled = scaled + (tile[i] * decays[i][None, :],)
        else:
            scaled = scaled + (tile[i] * decays[0],)
    return scaled


@triton.jit
def _plus_outer(tile, vector, u, BV: tl.constexpr, SPAN: tl.constexpr):
    """``S + k u^T``."""
    updated = ()
    column = tl.broadcast_to(u[:, None], [BV, SPAN])
    for i in tl.static_range(len(tile)):
        updated = updated + (tl.fma(tl.broadcast_to(vector[i][None, :], [BV, SPAN]), column, tile[i]),)
    return updated


# Lengths and what only scalars are read through decide nothing worth compiling for.
@triton.jit(do_not_specialize=["T", "a_b", "b_b", "parent_n", "parent_t"])
def recurrent(
    q, k, v, a, b, out, A_log, dt_bias, pool, read_slots, write_slots, offsets, steps, step_rows, parents,
    scale, softplus_beta, softplus_threshold, lower_bound,
    T, q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, a_b, a_t, a_h, a_d, b_b, b_t, b_h,
    o_b, o_t, o_h, o_d, A_h, dt_h, dt_d, pool_s, pool_h, pool_k, pool_v,
    step_r, step_t, step_h, step_k, step_v, parent_n, parent_t,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, ORDER: tl.constexpr, LEVELS: tl.constexpr,
    TWO: tl.constexpr, DEPTH: tl.constexpr,
    KDA: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, NEG_EIGVAL: tl.constexpr,
    VARLEN: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, STEPS: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """Program ``(n * HV + head) * tiles + tile`` of a one-dimensional grid; see ``launcher`` for the arguments.

    Strides are in elements, named after the tensor and the dimension: ``_b`` batch row, ``_t`` token, ``_h`` head,
    ``_d`` innermost, ``_s`` slot, ``_r`` row, ``_n`` sequence.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    tile_index = program % TILES
    head = ((program // TILES) % HV).to(tl.int64)
    n = (program // (TILES * HV)).to(tl.int64)
    group = head // GROUP
    rows = (tile_index * BV + tl.arange(0, BV)).to(tl.int64)
    zero = n * 0  # 64 bits wide, and so is what is added to it: offsets exceed 2**31

    # What tells where to read and write, and what every token needs: all at once, before anything waits for it.
    if VARLEN:
        first = tl.load(offsets + n).to(tl.int64)
        length = (tl.load(offsets + n + 1).to(tl.int64) - first).to(tl.int32)
        batch = zero
    else:
        first = zero
        length = T
        batch = n
    if READ:
        read = tl.load(read_slots + n).to(tl.int64)
    if WRITE:
        write = tl.load(write_slots + n).to(tl.int64)
    if STEPS:
        step_row = tl.load(step_rows + n).to(tl.int64)
    log_scale = tl.load(A_log + head * A_h).to(tl.float32)
    if KDA:
        biases = _in_float32(load_pieces(dt_bias + head * dt_h, dt_d, K, SPAN, LANES))
    else:
        biases = (tl.load(dt_bias + head * dt_h).to(tl.float32),)
    if length <= 0:
        return

    # The state comes from furthest away. A negative slot reads nothing and starts from zero.
    if READ:
        start = pool + tl.maximum(read, 0) * pool_s + head * pool_h
        tile = load_tile(start, pool_k, pool_v, rows, read >= 0, K, V, BV, SPAN, LANES)
    else:
        tile = ()
        for _ in tl.static_range(0, K, SPAN):
            tile = tile + (tl.zeros([BV, SPAN], tl.float32),)
    if STEPS:
        step_base = steps + tl.maximum(step_row, 0) * step_r + head * step_h

    # This head's first token.
    q_at = q + batch * q_b + first * q_t + group * q_h
    k_at = k + batch * k_b + first * k_t + group * k_h
    v_at = v + batch * v_b + first * v_t + head * v_h
    a_at = a + batch * a_b + first * a_t + head * a_h
    b_at = b + batch * b_b + first * b_t + head * b_h
    o_at = out + batch * o_b + first * o_t + head * o_h + rows * o_d

    # Beyond the end the last token is read again: no mask, no branch.
    last = zero + (length - 1)
    ahead = ()
    for i in tl.static_range(DEPTH):
        ahead = ahead + (
            _load_token(tl.minimum(zero + i, last), q_at, k_at, v_at, a_at, b_at,
                        q_t, q_d, k_t, k_d, v_t, v_d, a_t, a_d, b_t, rows, K, V, BV, SPAN, LANES, KDA),
        )  # fmt: skip
    if DEPTH > 0:
        token = _prepare(ahead[0], biases, log_scale, scale, softplus_beta, softplus_threshold, lower_bound,
                         SPAN, ORDER, LEVELS, TWO, BOUNDED, L2NORM, NEG_EIGVAL)  # fmt: skip
        ahead = ahead[1:]

    for t in range(length):
        row = zero + t
        new = _load_token(tl.minimum(row + DEPTH, last), q_at, k_at, v_at, a_at, b_at,
                          q_t, q_d, k_t, k_d, v_t, v_d, a_t, a_d, b_t, rows, K, V, BV, SPAN, LANES, KDA)  # fmt: skip
        if DEPTH == 0:
            token = _prepare(new, biases, log_scale, scale, softplus_beta, softplus_threshold, lower_bound,
                             SPAN, ORDER, LEVELS, TWO, BOUNDED, L2NORM, NEG_EIGVAL)  # fmt: skip
        key, query, value, decays, beta, key_factor, query_factor = token

        if TREE:
            if (t > 0) & (step_row >= 0):
                parent = tl.load(parents + n * parent_n + row * parent_t).to(tl.int64)
                if parent >= 0:
                    tile = load_tile(step_base + parent * step_t, step_k, step_v, rows, parent >= 0,
                                     K, V, BV, SPAN, LANES)  # fmt: skip
                else:
                    if READ:
                        tile = load_tile(start, pool_k, pool_v, rows, read >= 0, K, V, BV, SPAN, LANES)
                    else:
                        tile = _zeros(tile)

        decayed = _scaled(tile, decays, KDA)
        if KDA:
            predicted = dot_over_k(decayed, key, BV, SPAN, ORDER, LEVELS, TWO)
        else:
            predicted = dot_over_k(tile, key, BV, SPAN, ORDER, LEVELS, TWO) * decays[0]
        u = (value - predicted * key_factor) * (beta * key_factor)
        tile = _plus_outer(decayed, key, u, BV, SPAN)
        o = dot_over_k(tile, query, BV, SPAN, ORDER, LEVELS, TWO) * query_factor

        if V % BV == 0:
            tl.store(o_at + row * o_t, o.to(out.dtype.element_ty))
        else:
            tl.store(o_at + row * o_t, o.to(out.dtype.element_ty), mask=rows < V)
        if STEPS:
            if step_row >= 0:
                store_tile(tile, step_base + row * step_t, step_k, step_v, rows, K, V, BV, SPAN, LANES)
                if TREE:
                    tl.debug_barrier()  # other threads of this program may read it back as a parent
        if DEPTH > 0:
            # Nothing here waits for the state: the compiler may start it beside the sums above.
            ahead = ahead + (new,)
            token = _prepare(ahead[0], biases, log_scale, scale, softplus_beta, softplus_threshold, lower_bound,
                             SPAN, ORDER, LEVELS, TWO, BOUNDED, L2NORM, NEG_EIGVAL)  # fmt: skip
            ahead = ahead[1:]

    if WRITE:
        if write >= 0:
            store_tile(tile, pool + write * pool_s + head * pool_h, pool_k, pool_v, rows, K, V, BV, SPAN, LANES)


@triton.jit
def _zeros(tile):
    zeros = ()
    for i in tl.static_range(len(tile)):
        zeros = zeros + (tl.zeros_like(tile[i]),)
    return zeros
