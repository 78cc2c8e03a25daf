"""The recurrent kernel: one program keeps BV rows of one head's state in registers through a whole sequence.

    S = exp(g) * S;   u = beta * (v - S^T k);   S = S + k u^T;   o = S^T q

Nothing of the state touches memory between a sequence's first and last token. What depends on the state, and so cannot
be started early, is short: the sum over K of ``S k``, ``u``, and the update. The decay, the norms and the scale are
scalars that multiply sums instead of vectors.

Of several tokens in sequence, the scalars are computed for WINDOW tokens at once, one lane for each token's gates; one
lane hands each token's to the others. They come from memory a window ahead, which also brings q and k into the cache
nearest by; k is then read again one token ahead, v three. A token's output is summed beside the next one's ``S k``:
the two sums wait for their shuffles together.
"""

# The body of a Triton function is Triton's language: types are inferred, tuples grow by +, and a test of a constant
# stands alone and has its else, so that what it excludes is never compiled.
# ruff: noqa: ANN001, ANN201, ANN202, PLR5501, RET505, RUF005, SIM102, SIM108
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .gates import beta_of, decay_of
from .tiles import (
    dot_over_k,
    load_pieces,
    load_tile,
    placed,
    read_pieces,
    read_rows,
    square_norm,
    square_norms,
    store_tile,
)

__all__ = ["recurrent"]


@triton.jit
def _read_values(at, rows, V: tl.constexpr, BV: tl.constexpr):
    """``[BV]`` of one token's v, as stored."""
    if V % BV == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=rows < V, other=0.0)


@triton.jit
def _store_output(at, o, rows, wanted, V: tl.constexpr, BV: tl.constexpr):
    """``[BV]`` of one token's output, if ``wanted``."""
    mask = tl.full([BV], True, tl.int1) & wanted
    if V % BV != 0:
        mask = mask & (rows < V)
    tl.store(at, o.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _read_window(t, last, q, k, a, b, q_t, q_d, k_t, k_d, a_t, b_t, WINDOW: tl.constexpr, K: tl.constexpr,
                 CHAINS: tl.constexpr, KDA: tl.constexpr, L2NORM: tl.constexpr):  # fmt: skip
    """What the scalars of tokens t to t + WINDOW - 1 are made of; beyond the last token, of that one."""
    tokens = tl.minimum(t + tl.arange(0, WINDOW), last).to(tl.int64)
    keys, queries, gates = (), (), ()
    if L2NORM:
        keys = read_rows(k + tokens * k_t, k_d, WINDOW, K, CHAINS)
        queries = read_rows(q + tokens * q_t, q_d, WINDOW, K, CHAINS)
    if not KDA:
        gates = (tl.load(a + tokens * a_t),)
    return (keys, queries, gates, tl.load(b + tokens * b_t))


@triton.jit
def _decay(a, biases, A_log, softplus_beta, softplus_threshold, lower_bound, BOUNDED: tl.constexpr):
    """The decays of one token per key, or of several tokens: for each of the tuple ``a``."""
    decays = ()
    for i in tl.static_range(len(a)):
        x = a[i].to(tl.float32)
        decays = decays + (decay_of(x, biases[i], A_log, softplus_beta, softplus_threshold, lower_bound, BOUNDED),)
    return decays


@triton.jit
def _inverse_norm(squares):
    """``1 / sqrt(sum(x * x) + 1e-6)``: the epsilon inside."""
    return tl.rsqrt(squares + 1e-6)


@triton.jit
def _of_token(scalars, i):
    """``[1]`` of each ``[WINDOW]``: of token i of a window."""
    picked = ()
    index = tl.full([1], 0, tl.int32) + i
    for j in tl.static_range(len(scalars)):
        picked = picked + (tl.gather(scalars[j], index, 0),)
    return picked


@triton.jit
def _step(tile, key, value, beta, norm, decays, BV: tl.constexpr, SPAN: tl.constexpr, ORDER: tl.constexpr,
          LEVELS: tl.constexpr, TWO: tl.constexpr, KDA: tl.constexpr):  # fmt: skip
    """The state after a token with this k (not normalised: times ``norm``), v, beta and decay per key or for all."""
    decayed = ()
    for i in tl.static_range(len(tile)):
        if KDA:
            decayed = decayed + (tile[i] * decays[i][None, :],)
        else:
            decayed = decayed + (tile[i] * decays[0][:, None],)
    if KDA:
        predicted = dot_over_k(decayed, key, BV, SPAN, ORDER, LEVELS, TWO)
        factor = norm
    else:
        predicted = dot_over_k(tile, key, BV, SPAN, ORDER, LEVELS, TWO)
        factor = decays[0] * norm
    u = tl.fma(-predicted, tl.broadcast_to(factor, [BV]), value) * (beta * norm)
    column = tl.broadcast_to(u[:, None], [BV, SPAN])
    updated = ()
    for i in tl.static_range(len(tile)):
        updated = updated + (tl.fma(tl.broadcast_to(key[i][None, :], [BV, SPAN]), column, decayed[i]),)
    return updated


@triton.jit
def _zeros(tile):
    zeros = ()
    for i in tl.static_range(len(tile)):
        zeros = zeros + (tl.zeros_like(tile[i]),)
    return zeros


# Counts, lengths and what only scalars are read through decide nothing worth compiling for.
@triton.jit(do_not_specialize=["N", "T", "a_b", "g_t", "b_b", "b_t", "parent_n", "parent_t"])
def recurrent(
    q, k, v, a, b, out, A_log, dt_bias, pool, read_slots, write_slots, offsets, steps, step_rows, parents,
    scale, softplus_beta, softplus_threshold, lower_bound,
    N, T, q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, a_b, a_t, a_h, a_d, g_t, b_b, b_t, b_h,
    o_b, o_t, o_h, o_d, A_h, dt_h, dt_d, pool_s, pool_h, pool_k, pool_v,
    step_r, step_t, step_h, step_k, step_v, parent_n, parent_t,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, ORDER: tl.constexpr, LEVELS: tl.constexpr,
    TWO: tl.constexpr, WINDOW: tl.constexpr, NEXT: tl.constexpr,
    KDA: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, NEG_EIGVAL: tl.constexpr,
    VARLEN: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, STEPS: tl.constexpr, TREE: tl.constexpr,
    STREAM: tl.constexpr,
):  # fmt: skip
    """Program ``head * tiles + tile`` along x of sequence ``z * programs along y + y``; see ``arguments`` for the rest.

    Strides are in elements, named after the tensor and the dimension: ``_b`` batch row, ``_t`` token, ``_h`` head,
    ``_d`` innermost, ``_s`` slot, ``_r`` row, ``_n`` sequence. ``g_t`` is a's from token to token where it has a scalar
    per head, and ``a_t`` where it has a vector, whose alignment counts.

    WINDOW is a power of two above 1, or 0: then a token's scalars are computed with it, for sequences of one token.
    NEXT: windows are read one ahead, for sequences that have more than one.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    place = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    n = tl.minimum(place, N - 1).to(tl.int64)  # the grid's last layer along z need not be full
    program = tl.program_id(0)
    tile_index = program % TILES
    head = (program // TILES).to(tl.int64)
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
        biases = load_pieces(dt_bias + head * dt_h, dt_d, K, SPAN, LANES)
    else:
        biases = (tl.load(dt_bias + head * dt_h).to(tl.float32),)
    if (length <= 0) | (place >= N):
        return

    # The state comes from furthest away. A negative slot reads nothing and starts from zero.
    if READ:
        start = pool + tl.maximum(read, 0) * pool_s + head * pool_h
        tile = load_tile(start, pool_k, pool_v, rows, read >= 0, K, V, BV, SPAN, LANES, STREAM)
    else:
        tile = ()
        for _ in tl.static_range(0, K, SPAN):
            tile = tile + (tl.zeros([BV, SPAN], tl.float32),)
    if STEPS:
        step_base = steps + tl.maximum(step_row, 0) * step_r + head * step_h

    # This head's tokens. Pointers move on while there is a token to move to, so all of them stay inside.
    q_at = q + batch * q_b + first * q_t + group * q_h
    k_at = k + batch * k_b + first * k_t + group * k_h
    v_at = v + batch * v_b + first * v_t + head * v_h + rows * v_d
    if KDA:
        gate_t = a_t
    else:
        gate_t = g_t
    a_at = a + batch * a_b + first * gate_t + head * a_h
    b_at = b + batch * b_b + first * b_t + head * b_h
    o_at = out + batch * o_b + first * o_t + head * o_h + rows * o_d
    last = length - 1
    IO: tl.constexpr = q.dtype.element_ty
    A: tl.constexpr = a.dtype.element_ty
    LATE: tl.constexpr = WINDOW > 0 and not TREE  # outputs are summed beside the next token
    LAG: tl.constexpr = 1 if LATE else 0
    CHAINS: tl.constexpr = 2 * SPAN if TWO else SPAN
    CHAIN_LEVELS: tl.constexpr = LEVELS + 1 if TWO else LEVELS
    AHEAD: tl.constexpr = 3  # tokens that v is read ahead: it comes straight from memory

    if WINDOW > 0:
        q_0, k_0, a_0, b_0 = q_at, k_at, a_at, b_at
        if NEXT:
            window = _read_window(0, last, q_0, k_0, a_0, b_0, q_t, q_d, k_t, k_d, gate_t, b_t,
                                  WINDOW, K, CHAINS, KDA, L2NORM)  # fmt: skip
        keys = read_pieces(k_at, k_d, K, SPAN)
        values = (_read_values(v_at, rows, V, BV),)
        for i in tl.static_range(1, AHEAD):
            v_at += tl.where(i < length, v_t, 0)
            values = values + (_read_values(v_at, rows, V, BV),)
        if KDA:
            decays = _decay(placed(read_pieces(a_at, a_d, K, SPAN), A, SPAN, LANES), biases, log_scale,
                            softplus_beta, softplus_threshold, lower_bound, BOUNDED)  # fmt: skip
        query_factor = tl.zeros([1], tl.float32)
        none = tl.zeros([WINDOW], tl.float32)
        scalars = (none, none, none) if KDA else (none, none, none, none)

    for t in range(length):
        q_at += tl.where(t > LAG, q_t, 0)
        o_at += tl.where(t > LAG, o_t, 0)
        if WINDOW > 0:
            key = placed(keys, IO, SPAN, LANES)
            value = values[0].to(tl.float32)
            if t % WINDOW == 0:
                if not NEXT:
                    window = _read_window(t, last, q_0, k_0, a_0, b_0, q_t, q_d, k_t, k_d, gate_t, b_t,
                                          WINDOW, K, CHAINS, KDA, L2NORM)  # fmt: skip
                window_keys, window_queries, gates, b_now = window
                beta = beta_of(b_now.to(tl.float32), NEG_EIGVAL)
                if L2NORM:
                    norm = _inverse_norm(square_norms(window_keys, IO, WINDOW, CHAINS, CHAIN_LEVELS))
                    squares = square_norms(window_queries, IO, WINDOW, CHAINS, CHAIN_LEVELS)
                    scalars = (beta, norm, _inverse_norm(squares) * scale)
                else:
                    scalars = (beta, tl.full([WINDOW], 1.0, tl.float32), tl.zeros([WINDOW], tl.float32) + scale)
                scalars = scalars + _decay(gates, biases, log_scale, softplus_beta, softplus_threshold, lower_bound,
                                           BOUNDED)  # fmt: skip
                if NEXT:
                    window = _read_window(t + WINDOW, last, q_0, k_0, a_0, b_0, q_t, q_d, k_t, k_d, gate_t, b_t,
                                          WINDOW, K, CHAINS, KDA, L2NORM)  # fmt: skip
            token = _of_token(scalars, t % WINDOW)
            k_at += tl.where(t < last, k_t, 0)
            keys = read_pieces(k_at, k_d, K, SPAN)
            v_at += tl.where(t + AHEAD < length, v_t, 0)
            values = values[1:] + (_read_values(v_at, rows, V, BV),)
            query = placed(read_pieces(q_at, q_d, K, SPAN), IO, SPAN, LANES)
            if KDA:
                a_at += tl.where(t < last, a_t, 0)
                gates_ahead = read_pieces(a_at, a_d, K, SPAN)
            else:
                decays = token[3:]
        else:
            k_at += tl.where(t > 0, k_t, 0)
            v_at += tl.where(t > 0, v_t, 0)
            a_at += tl.where(t > 0, gate_t, 0)
            b_at += tl.where(t > 0, b_t, 0)
            key = load_pieces(k_at, k_d, K, SPAN, LANES)
            query = load_pieces(q_at, q_d, K, SPAN, LANES)
            value = _read_values(v_at, rows, V, BV).to(tl.float32)
            one = tl.full([1], 1.0, tl.float32)
            if KDA:
                gates = load_pieces(a_at, a_d, K, SPAN, LANES)
            else:
                gates = (one * tl.load(a_at).to(tl.float32),)
            decays = _decay(gates, biases, log_scale, softplus_beta, softplus_threshold, lower_bound, BOUNDED)
            beta = one * beta_of(tl.load(b_at).to(tl.float32), NEG_EIGVAL)
            if L2NORM:
                norm = _inverse_norm(square_norm(key, SPAN, ORDER, LEVELS, TWO))
                token = (beta, norm, _inverse_norm(square_norm(query, SPAN, ORDER, LEVELS, TWO)) * scale)
            else:
                token = (beta, one, one * scale)

        if TREE:
            if (t > 0) & (step_row >= 0):
                parent = tl.load(parents + n * parent_n + (zero + t) * parent_t).to(tl.int64)
                if parent >= 0:
                    tile = load_tile(step_base + parent * step_t, step_k, step_v, rows, parent >= 0,
                                     K, V, BV, SPAN, LANES, False)  # fmt: skip
                else:
                    if READ:
                        tile = load_tile(start, pool_k, pool_v, rows, read >= 0, K, V, BV, SPAN, LANES, False)
                    else:
                        tile = _zeros(tile)

        if LATE:
            o = dot_over_k(tile, query, BV, SPAN, ORDER, LEVELS, TWO) * query_factor
            _store_output(o_at, o, rows, t > 0, V, BV)
            query_factor = token[2]
        tile = _step(tile, key, value, token[0], token[1], decays, BV, SPAN, ORDER, LEVELS, TWO, KDA)
        if not LATE:
            o = dot_over_k(tile, query, BV, SPAN, ORDER, LEVELS, TWO) * token[2]
            _store_output(o_at, o, rows, True, V, BV)
        if STEPS:
            if step_row >= 0:
                store_tile(tile, step_base + (zero + t) * step_t, step_k, step_v, rows,
                           K, V, BV, SPAN, LANES, STREAM and not TREE)  # fmt: skip
                if TREE:
                    tl.debug_barrier()  # other threads of this program may read it back as a parent
        if KDA:
            if WINDOW > 0:
                # Nothing here waits for the state: the compiler may start it beside the sums above.
                decays = _decay(placed(gates_ahead, A, SPAN, LANES), biases, log_scale,
                                softplus_beta, softplus_threshold, lower_bound, BOUNDED)  # fmt: skip

    if LATE:
        q_at += tl.where(length > 1, q_t, 0)
        o_at += tl.where(length > 1, o_t, 0)
        query = placed(read_pieces(q_at, q_d, K, SPAN), IO, SPAN, LANES)
        o = dot_over_k(tile, query, BV, SPAN, ORDER, LEVELS, TWO) * query_factor
        _store_output(o_at, o, rows, True, V, BV)
    if WRITE:
        if write >= 0:
            store_tile(tile, pool + write * pool_s + head * pool_h, pool_k, pool_v, rows,
                       K, V, BV, SPAN, LANES, STREAM)  # fmt: skip
