"""Decode: sequences of one token. Nothing is staged and no barrier is met: every lane loads its own part of q and k.

One memory latency brings slots and offsets, one more q, k, v, gates and states together; norms, prediction and output
then take a round of shuffles each, in every group of lanes for itself. Each group computes the norms and the gates
again, which the memory hides. A longer sequence comes out right as well, one token after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float32, int64, uint32

from .gates import beta_function, decay_function, growth_function
from .parameters import inner_strides
from .places import (
    A_BATCH,
    A_HEAD,
    A_LOG_HEAD,
    A_TOKEN,
    B_BATCH,
    B_HEAD,
    B_TOKEN,
    BLOCK,
    DT_BIAS_HEAD,
    K_BATCH,
    K_HEAD,
    K_INNER,
    K_TOKEN,
    OUT_BATCH,
    OUT_HEAD,
    OUT_INNER,
    OUT_TOKEN,
    POOL_HEAD,
    POOL_K,
    POOL_SLOT,
    POOL_V,
    Q_BATCH,
    Q_HEAD,
    Q_INNER,
    Q_TOKEN,
    THREAD,
    V_BATCH,
    V_HEAD,
    V_INNER,
    V_TOKEN,
    locate_of,
)
from .reduce import held_column, idle_bits, reduce_outputs, reduce_predictions
from .registers import column_sums, gdn_update
from .rows import fetch_row, misaligned, squares
from .states import clear_state, load_state, store_state
from .target import Function, Target, quad_words
from .tokens import put_output_of
from .variant import CHUNK, Variant

__all__ = ["decode_kernel"]

_EPSILON = np.float32(1e-6)
_ONE = np.float32(1.0)
_NOTHING = np.uint32(0)


def decode_kernel(variant: Variant, target: Target) -> Function:
    """The kernel as a Python function of the parameters in ``parameters``, for GDN without intermediate states."""
    lanes, columns, groups, tile = variant.lanes, variant.columns, variant.groups, variant.tile
    sharing, tiles = variant.sharing, variant.tiles
    per_lane, pieces, value_dim, l2norm = variant.per_lane, variant.pieces, variant.v, variant.l2norm
    state_size, exchanged = columns * per_lane, 2 * columns
    all_v = variant.v % variant.tile == 0
    reads, writes = variant.state is not None, variant.update in ("in_place", "separate")
    stages = lanes.bit_length() - 1
    words, chunk = quad_words(variant.io), CHUNK
    row_words = pieces * words
    state_dtype = variant.state or "float32"
    load_slot = load_state(variant, target, state_dtype, variant.streaming)
    store_slot = store_state(variant, target, state_dtype, variant.streaming)
    clear, locate = clear_state(variant, target), locate_of(variant, target)
    row_mask, fetch = misaligned(variant, variant.io), fetch_row(variant, target, variant.io, pieces, lanes)
    decode_quad, sums_of = target.decode_quad(variant.io), squares(target, pieces)
    exchange, rsqrt, fma, pin = target.exchange(2), target.rsqrt, target.fma, target.pin
    sums, update = column_sums(variant, target), gdn_update(variant, target)
    reduce_first, reduce_second = reduce_predictions(variant, target), reduce_outputs(variant, target)
    first_held, idle = held_column(variant, target), idle_bits(variant)
    put_output = put_output_of(variant, target)
    decay_of, beta_of, growth_of = (
        decay_function(variant, target),
        beta_function(variant, target),
        growth_function(target),
    )
    load_A_log, load_bias = target.load_raw(variant.A_log), target.load_raw(variant.dt_bias)
    load_a, load_b, load_v = target.load_raw(variant.a), target.load_raw(variant.b), target.load_raw(variant.io)
    decode_A_log, decode_bias = target.decode(variant.A_log), target.decode(variant.dt_bias)
    decode_a, decode_b, decode_v = target.decode(variant.a), target.decode(variant.b), target.decode(variant.io)
    packed = variant.strides != "any"
    inner = inner_strides(variant)
    q_item, k_apart, v_apart = inner["q_inner"], inner["pool_k"], inner["pool_v"]

    def kernel(
        A_log: Any,
        a: Any,
        dt_bias: Any,
        q: Any,
        k: Any,
        v: Any,
        b: Any,
        out: Any,
        pool: Any,
        read_slots: Any,
        write_slots: Any,
        cu_seqlens: Any,
        intermediates: Any,
        intermediate_rows: Any,
        parents: Any,
        strides: Any,
        sequences: Any,
        row_length: Any,
        parent_steps: Any,
        wide_read: Any,
        wide_write: Any,
        wide_cu: Any,
        wide_rows: Any,
        wide_parents: Any,
        scale: Any,
        softplus_beta: Any,
        softplus_threshold: Any,
        lower_bound: Any,
    ) -> None:
        n = (cuda.blockIdx.z * cuda.gridDim.y + cuda.blockIdx.y) & BLOCK
        if n >= (sequences & BLOCK):  # the grid's last layer along z need not be full
            return
        block = cuda.blockIdx.x & BLOCK
        head = block // tiles
        thread = cuda.threadIdx.x & THREAD
        lane = thread % 32
        j = lane % lanes
        column = (block % tiles) * tile + (thread // 32 * groups + lane // lanes) * columns
        found = cuda.local.array(6, int64)
        locate(
            n,
            row_length,
            read_slots,
            write_slots,
            cu_seqlens,
            intermediate_rows,
            wide_read,
            wide_write,
            wide_cu,
            wide_rows,
            found,
        )
        batch, start, length = found[0], found[1], found[2]
        read_slot, write_slot = found[3], found[4]
        raw_A_log = load_A_log(A_log + head * strides[A_LOG_HEAD])
        raw_bias = load_bias(dt_bias + head * strides[DT_BIAS_HEAD])
        # Everything that needs no index is computed while the indices are under way.
        qk_head = head // sharing
        q_at = pin(q + qk_head * strides[Q_HEAD])
        k_at = pin(k + qk_head * strides[K_HEAD])
        v_at = pin(v + head * strides[V_HEAD])
        a_at = pin(a + head * strides[A_HEAD])
        b_at = pin(b + head * strides[B_HEAD])
        out_at = pin(out + head * strides[OUT_HEAD])
        start_state = pin(pool + head * strides[POOL_HEAD])
        end_state = start_state + write_slot * strides[POOL_SLOT]
        start_state += read_slot * strides[POOL_SLOT]
        if length <= 0:  # nothing is touched
            return

        q_at += batch * strides[Q_BATCH] + start * strides[Q_TOKEN]
        k_at += batch * strides[K_BATCH] + start * strides[K_TOKEN]
        v_at += batch * strides[V_BATCH] + start * strides[V_TOKEN]
        a_at += batch * strides[A_BATCH] + start * strides[A_TOKEN]
        b_at += batch * strides[B_BATCH] + start * strides[B_TOKEN]
        out_at += batch * strides[OUT_BATCH] + start * strides[OUT_TOKEN]
        q_inner = q_item if packed else strides[Q_INNER]
        k_inner = q_item if packed else strides[K_INNER]
        v_inner = q_item if packed else strides[V_INNER]
        out_inner = q_item if packed else strides[OUT_INNER]
        pool_k = k_apart if packed else strides[POOL_K]
        pool_v = v_apart if packed else strides[POOL_V]
        aligned = ((q_at | k_at | strides[Q_TOKEN] | strides[K_TOKEN]) & row_mask) == 0

        raw_q = cuda.local.array(row_words, uint32)
        raw_k = cuda.local.array(row_words, uint32)
        raw_v = cuda.local.array(columns, uint32)
        state = cuda.local.array(state_size, float32)
        key = cuda.local.array(per_lane, float32)
        query = cuda.local.array(per_lane, float32)
        chunk_sums = cuda.local.array(pieces, float32)
        factors = cuda.local.array(2, float32)
        change = cuda.local.array(columns, float32)
        predictions = cuda.local.array(columns, float32)
        outputs = cuda.local.array(columns, float32)
        sent = cuda.local.array(exchanged, float32)
        received = cuda.local.array(exchanged, float32)
        held = column + first_held(j)
        holds = (j & idle) == 0

        # First of all: compilers move arithmetic on q and k ahead of what comes later, and it waits for q and k.
        if reads and read_slot >= 0:
            load_slot(state, start_state, j, column, pool_k, pool_v)
        else:
            clear(state)
        for t in range(length):
            fetch(k_at + t * strides[K_TOKEN], k_inner, aligned, j, raw_k, 0)
            fetch(q_at + t * strides[Q_TOKEN], q_inner, aligned, j, raw_q, 0)
            raw_a = load_a(a_at + t * strides[A_TOKEN])
            raw_b = load_b(b_at + t * strides[B_TOKEN])
            for r in range(columns):
                bits = _NOTHING
                if all_v or column + r < value_dim:
                    bits = load_v(v_at + t * strides[V_TOKEN] + (column + r) * v_inner)
                raw_v[r] = bits

            for p in range(pieces):
                decode_quad(raw_q, words * p, query, chunk * p)
                decode_quad(raw_k, words * p, key, chunk * p)
            factors[0] = _ONE
            factors[1] = _ONE
            if l2norm:
                factors[0] = sums_of(query, chunk_sums)
                factors[1] = sums_of(key, chunk_sums)
                for stage in range(stages):
                    exchange(factors, lanes >> (stage + 1), received)
                    factors[0] += received[0]
                    factors[1] += received[1]
                factors[0] = rsqrt(factors[0] + _EPSILON)
                factors[1] = rsqrt(factors[1] + _EPSILON)
            q_factor = factors[0] * scale
            k_factor = factors[1]
            for i in range(per_lane):
                query[i] *= q_factor
                key[i] *= k_factor
            A_log_value = decode_A_log(raw_A_log)
            growth = float32(growth_of(A_log_value))
            x = decode_a(raw_a) + decode_bias(raw_bias)
            decay: Any = float32(decay_of(x, A_log_value, growth, softplus_beta, softplus_threshold, lower_bound))
            beta: Any = float32(beta_of(decode_b(raw_b)))

            sums(state, key, chunk_sums, predictions)
            reduce_first(predictions, received)
            for r in range(columns):
                change[r] = beta * fma(-decay, predictions[r], decode_v(raw_v[r]))
            update(state, key, change, decay, change)
            sums(state, query, chunk_sums, outputs)
            reduce_second(j, outputs, sent, received)
            put_output(out_at + t * strides[OUT_TOKEN] + held * out_inner, held, out_inner, holds, outputs)
        if writes and write_slot >= 0:
            store_slot(state, end_state, j, column, pool_k, pool_v)

    return kernel
