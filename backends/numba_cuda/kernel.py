"""The kernel: one block per (sequence, value head, tile of V columns), one pass over its states per token.

The states stay in registers from the first token to the last. While a window of tokens is computed, the next one's
q, k, v and gates are already on their way from global memory; they are normalised into the other half of a double
buffer in shared memory, so a window costs one barrier. With ``stagers`` that is the work of further warps.
Sequences of one token take the shorter way of ``decode``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda, float32, int64, uint32

from .decode import decode_kernel
from .parameters import inner_strides
from .places import (
    A_BATCH,
    A_HEAD,
    A_INNER,
    A_LOG_HEAD,
    A_TOKEN,
    B_BATCH,
    B_HEAD,
    B_TOKEN,
    BLOCK,
    DT_BIAS_HEAD,
    DT_BIAS_INNER,
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
    STEPS_HEAD,
    STEPS_K,
    STEPS_ROW,
    STEPS_STEP,
    STEPS_V,
    THREAD,
    V_BATCH,
    V_HEAD,
    V_INNER,
    V_TOKEN,
    locate_of,
)
from .reduce import held_column, idle_bits, reduce_both, reduce_outputs, reduce_predictions
from .registers import column_sums, gdn_update, kda_update, scaled_key
from .rows import misaligned
from .staging import staging
from .states import clear_state, load_state, store_state
from .target import Function, Target
from .tokens import biases_of, put_output_of, read_values_of, read_vector_of
from .variant import Variant

__all__ = ["recurrence"]

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@cache
def recurrence(variant: Variant, target: Target) -> Function:
    """The kernel as a Python function of the parameters in ``parameters``; grid: see ``places.grid``."""
    return staged_kernel(variant, target) if variant.window else decode_kernel(variant, target)


def staged_kernel(variant: Variant, target: Target) -> Function:
    """Any number of tokens, staged in windows."""
    lanes, columns, groups = variant.lanes, variant.columns, variant.groups
    warps, apart = variant.warps, variant.stagers > 0
    sharing, window, tile, tiles = variant.sharing, variant.window, variant.tile, variant.tiles
    per_lane, padded, pieces = variant.per_lane, variant.padded_k, variant.pieces
    state_size, exchanged = columns * per_lane, 2 * columns
    kda, overlap = variant.kda, variant.overlap
    reads, writes = variant.state is not None, variant.update in ("in_place", "separate")
    verify, tree = variant.verify != "none", variant.verify == "tree"
    stages = staging(variant, target)
    row_mask, decay_mask = misaligned(variant, variant.io), misaligned(variant, variant.a)
    fetch, stage = stages.fetch, stages.stage
    row_words, value_words, decay_words, bias_count = stages.rows, stages.values, stages.decays, stages.biases
    vector_room, value_room, gate_room = 2 * window * padded, 2 * window * tile, 2 * window
    decay_room = vector_room if kda else gate_room
    state_dtype, step_dtype = variant.state or "float32", variant.steps or "float32"
    load_slot = load_state(variant, target, state_dtype, variant.streaming)
    store_slot = store_state(variant, target, state_dtype, variant.streaming)
    load_step, store_step = load_state(variant, target, step_dtype), store_state(variant, target, step_dtype)
    clear, locate = clear_state(variant, target), locate_of(variant, target)
    sums, update = column_sums(variant, target), (kda_update if kda else gdn_update)(variant, target)
    scale_key, read_vector = scaled_key(variant, target), read_vector_of(variant, target)
    read_values, put_output = read_values_of(variant, target), put_output_of(variant, target)
    reduce_first, reduce_second = reduce_predictions(variant, target), reduce_outputs(variant, target)
    reduce_together, read_one = reduce_both(variant, target), target.read_one
    first_held, idle = held_column(variant, target), idle_bits(variant)
    load_A_log, biases = target.load_raw(variant.A_log), biases_of(variant, target)
    load_index, fma, pin = target.load_index, target.fma, target.pin
    packed = variant.strides != "any"
    inner = inner_strides(variant)
    q_item, a_item, bias_item = inner["q_inner"], inner["a_inner"], inner["dt_bias_inner"]
    k_apart, v_apart = inner["pool_k"], inner["pool_v"]
    k_step_apart, v_step_apart = inner["steps_k"], inner["steps_v"]

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
        first_column = (block % tiles) * tile
        thread = cuda.threadIdx.x & THREAD
        warp = thread // 32
        if apart:
            # From a shuffle, the assembler knows that a warp's lanes agree on it, and shuffles need no reconvergence.
            warp = cuda.shfl_sync(0xFFFFFFFF, warp, 0) & THREAD
        lane = thread % 32
        j = lane % lanes
        slot = warp - warps if apart else warp
        staging_here = not apart or warp >= warps
        computing_here = not apart or warp < warps
        own_column = (warp * groups + lane // lanes) * columns
        column = first_column + own_column
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
        read_slot, write_slot, step_row = found[3], found[4], found[5]
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
        steps_at = intermediates + step_row * strides[STEPS_ROW] + head * strides[STEPS_HEAD]
        q_inner = q_item if packed else strides[Q_INNER]
        k_inner = q_item if packed else strides[K_INNER]
        v_inner = q_item if packed else strides[V_INNER]
        out_inner = q_item if packed else strides[OUT_INNER]
        a_inner = a_item if packed else strides[A_INNER]
        bias_inner = bias_item if packed else strides[DT_BIAS_INNER]
        pool_k = k_apart if packed else strides[POOL_K]
        pool_v = v_apart if packed else strides[POOL_V]
        steps_k = k_step_apart if packed else strides[STEPS_K]
        steps_v = v_step_apart if packed else strides[STEPS_V]
        aligned = ((q_at | k_at | strides[Q_TOKEN] | strides[K_TOKEN]) & row_mask) == 0
        aligned_a = ((a_at | strides[A_TOKEN]) & decay_mask) == 0

        shared_q = cuda.shared.array(vector_room, float32, alignment=16)
        shared_k = cuda.shared.array(vector_room, float32, alignment=16)
        shared_decay = cuda.shared.array(decay_room, float32, alignment=16)
        shared_v = cuda.shared.array(value_room, float32, alignment=16)
        shared_beta = cuda.shared.array(gate_room, float32, alignment=16)
        raw_q = cuda.local.array(row_words, uint32)
        raw_k = cuda.local.array(row_words, uint32)
        raw_a = cuda.local.array(decay_words, uint32)
        raw_v = cuda.local.array(value_words, uint32)
        raw_b = cuda.local.array(1, uint32)
        raw_bias = cuda.local.array(bias_count, uint32)
        state = cuda.local.array(state_size, float32)
        key = cuda.local.array(per_lane, float32)
        query = cuda.local.array(per_lane, float32)
        decays = cuda.local.array(per_lane, float32)
        weighted = cuda.local.array(per_lane, float32)
        chunk_sums = cuda.local.array(pieces, float32)
        value = cuda.local.array(columns, float32)
        change = cuda.local.array(columns, float32)
        predictions = cuda.local.array(columns, float32)
        outputs = cuda.local.array(columns, float32)
        sent = cuda.local.array(exchanged, float32)
        received = cuda.local.array(exchanged, float32)

        raw_A_log = load_A_log(A_log + head * strides[A_LOG_HEAD])
        biases(dt_bias + head * strides[DT_BIAS_HEAD], lane, bias_inner, raw_bias)
        held = column + first_held(j)
        holds = (j & idle) == 0
        # Where this lane's next output goes.
        put_at = out_at + held * out_inner
        if overlap:
            put_at -= strides[OUT_TOKEN]
            for i in range(per_lane):
                query[i] = _ZERO

        # Round -1 brings in the state and the first window; every other round computes one window.
        buffer = 1
        for base in range(-window, length, window):
            following = base + window
            more = following < length
            if more and staging_here:
                fetch(
                    following,
                    length,
                    slot,
                    lane,
                    first_column,
                    q_at,
                    k_at,
                    v_at,
                    a_at,
                    b_at,
                    strides,
                    q_inner,
                    k_inner,
                    v_inner,
                    a_inner,
                    aligned,
                    aligned_a,
                    raw_q,
                    raw_k,
                    raw_v,
                    raw_a,
                    raw_b,
                )
            if not computing_here:
                pass
            elif base < 0:
                if reads and read_slot >= 0:
                    load_slot(state, start_state, j, column, pool_k, pool_v)
                else:
                    clear(state)
            else:
                for i in range(min(window, length - base)):
                    t = base + i
                    staged = buffer * window + i
                    if tree and t > 0 and step_row >= 0:
                        parent_at = parents + (n * parent_steps + t) * (8 if wide_parents else 4)
                        parent = load_index(parent_at, wide_parents)
                        if parent >= 0:
                            parent_state = steps_at + parent * strides[STEPS_STEP]
                            load_step(state, parent_state, j, column, steps_k, steps_v)
                        elif reads and read_slot >= 0:
                            load_slot(state, start_state, j, column, pool_k, pool_v)
                        else:
                            clear(state)
                    read_vector(shared_k, staged * padded, j, key)
                    read_values(shared_v, staged * tile + own_column, value)
                    beta = read_one(shared_beta, staged)
                    decay = _ONE
                    if kda:
                        read_vector(shared_decay, staged * padded, j, decays)
                        scale_key(key, decays, weighted)
                        sums(state, weighted, chunk_sums, predictions)
                    else:
                        decay = read_one(shared_decay, staged)
                        sums(state, key, chunk_sums, predictions)
                    if overlap:
                        # The last token's output, reduced in the shadow of this token's prediction.
                        sums(state, query, chunk_sums, outputs)
                        reduce_together(j, predictions, outputs, sent, received)
                        put_output(put_at, held, out_inner, holds and t > 0, outputs)
                    else:
                        reduce_first(predictions, received)
                    for r in range(columns):
                        change[r] = beta * fma(-decay, predictions[r], value[r])
                    update(state, key, change, decay, decays)
                    read_vector(shared_q, staged * padded, j, query)
                    if not overlap:
                        sums(state, query, chunk_sums, outputs)
                        reduce_second(j, outputs, sent, received)
                        put_output(put_at, held, out_inner, holds, outputs)
                    put_at += strides[OUT_TOKEN]
                    if verify and step_row >= 0:
                        store_step(state, steps_at + t * strides[STEPS_STEP], j, column, steps_k, steps_v)
            buffer = 1 - buffer
            if more:
                if staging_here:
                    stage(
                        buffer,
                        slot,
                        lane,
                        scale,
                        softplus_beta,
                        softplus_threshold,
                        lower_bound,
                        raw_q,
                        raw_k,
                        raw_v,
                        raw_a,
                        raw_b,
                        raw_A_log,
                        raw_bias,
                        shared_q,
                        shared_k,
                        shared_v,
                        shared_decay,
                        shared_beta,
                    )
                cuda.syncthreads()
        if not computing_here:
            return
        if overlap:
            sums(state, query, chunk_sums, outputs)
            reduce_second(j, outputs, sent, received)
            put_output(put_at, held, out_inner, holds, outputs)
        if writes and write_slot >= 0:
            store_slot(state, end_state, j, column, pool_k, pool_v)

    return kernel
