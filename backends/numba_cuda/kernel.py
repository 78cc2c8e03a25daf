"""The kernel: one block per (sequence, value head, tile of V columns), one pass over its states per token.

The states stay in registers from the first token to the last. While a window of tokens is computed, the next one's
q, k, v and gates are already on their way from global memory; they are normalised into the other half of a double
buffer in shared memory, so a window costs one barrier.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from .parameters import STRIDES, inner_strides
from .reduce import held_column, holds_output, reduce_both, reduce_outputs, reduce_predictions
from .registers import column_sums, gdn_update, kda_update, scaled_key
from .staging import staging
from .states import clear_state, load_state, store_state
from .target import Function, Target
from .tokens import biases_of, put_output_of, read_vector_of
from .variant import Variant

__all__ = ["recurrence"]

# Places in the kernel's argument ``strides``.
(
    Q_BATCH,
    Q_TOKEN,
    Q_HEAD,
    Q_INNER,
    K_BATCH,
    K_TOKEN,
    K_HEAD,
    K_INNER,
    V_BATCH,
    V_TOKEN,
    V_HEAD,
    V_INNER,
    A_BATCH,
    A_TOKEN,
    A_HEAD,
    A_INNER,
    B_BATCH,
    B_TOKEN,
    B_HEAD,
    OUT_BATCH,
    OUT_TOKEN,
    OUT_HEAD,
    OUT_INNER,
    A_LOG_HEAD,
    DT_BIAS_HEAD,
    DT_BIAS_INNER,
    POOL_SLOT,
    POOL_HEAD,
    POOL_K,
    POOL_V,
    STEPS_ROW,
    STEPS_STEP,
    STEPS_HEAD,
    STEPS_K,
    STEPS_V,
) = range(len(STRIDES))

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@cache
def recurrence(variant: Variant, target: Target) -> Function:
    """The kernel as a Python function of the parameters in ``parameters``; grid: sequences x HV x tiles."""
    lanes, columns, groups, tiles = variant.lanes, variant.columns, variant.groups, variant.tiles
    warps = variant.warps
    heads, group_size, window, tile = variant.hv, variant.hv // variant.h, variant.window, variant.tile
    per_lane, padded, pieces = variant.per_lane, variant.padded_k, variant.pieces
    state_size, exchanged = columns * per_lane, 2 * columns
    varlen, kda, overlap = variant.varlen, variant.kda, variant.overlap
    reads, in_place = variant.state is not None, variant.update == "in_place"
    writes = variant.update in ("in_place", "separate")
    verify, tree = variant.verify != "none", variant.verify == "tree"
    stages = staging(variant, target)
    fetch_vectors, fetch_values, fetch_gates = stages.fetch_vectors, stages.fetch_values, stages.fetch_gates
    stage_vectors, stage_values, stage_gates = stages.stage_vectors, stages.stage_values, stages.stage_gates
    vectors, values, gates, bias_count = stages.vectors, stages.values, stages.gates, stages.biases
    vector_room, value_room, gate_room = 2 * window * padded, 2 * window * tile, 2 * window
    decay_room = vector_room if kda else gate_room
    state_dtype, step_dtype = variant.state or "float32", variant.steps or "float32"
    load_slot, store_slot = load_state(variant, target, state_dtype), store_state(variant, target, state_dtype)
    load_step, store_step = load_state(variant, target, step_dtype), store_state(variant, target, step_dtype)
    clear = clear_state(variant, target)
    sums, update = column_sums(variant, target), (kda_update if kda else gdn_update)(variant, target)
    scale_key, read_vector = scaled_key(variant, target), read_vector_of(variant, target)
    reduce_first, reduce_second = reduce_predictions(variant, target), reduce_outputs(variant, target)
    reduce_together, put_output = reduce_both(variant, target), put_output_of(variant, target)
    first_held, holds_any = held_column(variant, target), holds_output(variant, target)
    load_A_log, biases = target.load_raw(variant.A_log), biases_of(variant, target)
    load_index, fma = target.load_index, target.fma
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
        block = cuda.blockIdx.x
        n = block // (heads * tiles)
        head = (block // tiles) % heads
        first_column = (block % tiles) * tile
        warp = cuda.threadIdx.x // 32
        lane = cuda.threadIdx.x % 32
        j = lane % lanes
        gate_warp = (warp + 1) % warps
        value_warp = (warp + 2) % warps
        column = first_column + (warp * groups + lane // lanes) * columns

        # Which tokens, which states. An empty sequence touches none of them.
        if varlen:
            start = load_index(cu_seqlens + n * (8 if wide_cu else 4), wide_cu)
            length = load_index(cu_seqlens + (n + 1) * (8 if wide_cu else 4), wide_cu) - start
            batch = 0
        else:
            start = 0
            length = row_length
            batch = n
        read_slot = -1
        write_slot = -1
        step_row = -1
        if reads:
            read_slot = load_index(read_slots + n * (8 if wide_read else 4), wide_read)
        if in_place:
            write_slot = read_slot
        elif writes:
            write_slot = load_index(write_slots + n * (8 if wide_write else 4), wide_write)
        if verify:
            step_row = load_index(intermediate_rows + n * (8 if wide_rows else 4), wide_rows)
        # Nothing above waits for anything above it: one memory latency, whatever comes next.
        if length <= 0:
            return

        qk_head = head // group_size
        q_at = q + batch * strides[Q_BATCH] + start * strides[Q_TOKEN] + qk_head * strides[Q_HEAD]
        k_at = k + batch * strides[K_BATCH] + start * strides[K_TOKEN] + qk_head * strides[K_HEAD]
        v_at = v + batch * strides[V_BATCH] + start * strides[V_TOKEN] + head * strides[V_HEAD]
        a_at = a + batch * strides[A_BATCH] + start * strides[A_TOKEN] + head * strides[A_HEAD]
        b_at = b + batch * strides[B_BATCH] + start * strides[B_TOKEN] + head * strides[B_HEAD]
        out_at = out + batch * strides[OUT_BATCH] + start * strides[OUT_TOKEN] + head * strides[OUT_HEAD]
        start_state = pool + read_slot * strides[POOL_SLOT] + head * strides[POOL_HEAD]
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

        shared_q = cuda.shared.array(vector_room, float32, alignment=16)
        shared_k = cuda.shared.array(vector_room, float32, alignment=16)
        shared_decay = cuda.shared.array(decay_room, float32, alignment=16)
        shared_v = cuda.shared.array(value_room, float32, alignment=16)
        shared_beta = cuda.shared.array(gate_room, float32, alignment=16)
        raw_q = cuda.local.array(vectors, uint32)
        raw_k = cuda.local.array(vectors, uint32)
        raw_a = cuda.local.array(gates, uint32)
        raw_v = cuda.local.array(values, uint32)
        raw_b = cuda.local.array(1, uint32)
        raw_bias = cuda.local.array(bias_count, uint32)
        state = cuda.local.array(state_size, float32)
        key = cuda.local.array(per_lane, float32)
        query = cuda.local.array(per_lane, float32)
        decays = cuda.local.array(per_lane, float32)
        weighted = cuda.local.array(per_lane, float32)
        chunk_sums = cuda.local.array(pieces, float32)
        change = cuda.local.array(columns, float32)
        predictions = cuda.local.array(columns, float32)
        outputs = cuda.local.array(columns, float32)
        sent = cuda.local.array(exchanged, float32)
        received = cuda.local.array(exchanged, float32)

        raw_A_log = load_A_log(A_log + head * strides[A_LOG_HEAD])
        biases(dt_bias + head * strides[DT_BIAS_HEAD], lane, bias_inner, raw_bias)
        held = column + first_held(j)
        holds = holds_any(j)
        if overlap:
            for i in range(per_lane):
                query[i] = _ZERO

        # Round -1 brings in the state and the first window; every other round computes one window.
        buffer = 1
        for base in range(-window, length, window):
            following = base + window
            more = following < length
            if more:
                fetch_vectors(
                    following,
                    length,
                    warp,
                    lane,
                    q_at,
                    k_at,
                    strides[Q_TOKEN],
                    strides[K_TOKEN],
                    q_inner,
                    k_inner,
                    raw_q,
                    raw_k,
                )
                fetch_gates(
                    following,
                    length,
                    gate_warp,
                    lane,
                    a_at,
                    b_at,
                    strides[A_TOKEN],
                    strides[B_TOKEN],
                    a_inner,
                    raw_a,
                    raw_b,
                )
                fetch_values(following, length, value_warp, lane, v_at, strides[V_TOKEN], v_inner, first_column, raw_v)
            if base < 0:
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
                    beta = shared_beta[staged]
                    decay = _ONE
                    if kda:
                        read_vector(shared_decay, staged * padded, j, decays)
                        scale_key(key, decays, weighted)
                        sums(state, weighted, chunk_sums, predictions)
                    else:
                        decay = shared_decay[staged]
                        sums(state, key, chunk_sums, predictions)
                    if overlap:
                        # The last token's output, reduced in the shadow of this token's prediction.
                        sums(state, query, chunk_sums, outputs)
                        reduce_together(j, predictions, outputs, sent, received)
                        if t > 0:
                            put_output(out_at + (t - 1) * strides[OUT_TOKEN], held, out_inner, holds, outputs)
                    else:
                        reduce_first(predictions, received)
                    for r in range(columns):
                        value = shared_v[staged * tile + column - first_column + r]
                        change[r] = beta * fma(-decay, predictions[r], value)
                    update(state, key, change, decay, decays)
                    read_vector(shared_q, staged * padded, j, query)
                    if not overlap:
                        sums(state, query, chunk_sums, outputs)
                        reduce_second(j, outputs, sent, received)
                        put_output(out_at + t * strides[OUT_TOKEN], held, out_inner, holds, outputs)
                    if verify and step_row >= 0:
                        store_step(state, steps_at + t * strides[STEPS_STEP], j, column, steps_k, steps_v)
            buffer = 1 - buffer
            if more:
                stage_vectors(following, length, buffer, warp, lane, scale, raw_q, raw_k, shared_q, shared_k)
                stage_values(following, length, buffer, value_warp, lane, raw_v, shared_v)
                stage_gates(
                    following,
                    length,
                    buffer,
                    gate_warp,
                    lane,
                    raw_bias,
                    raw_A_log,
                    softplus_beta,
                    softplus_threshold,
                    lower_bound,
                    raw_a,
                    raw_b,
                    shared_decay,
                    shared_beta,
                )
                cuda.syncthreads()
        if overlap:
            sums(state, query, chunk_sums, outputs)
            reduce_second(j, outputs, sent, received)
            put_output(out_at + (length - 1) * strides[OUT_TOKEN], held, out_inner, holds, outputs)
        if writes and write_slot >= 0:
            end_state = pool + write_slot * strides[POOL_SLOT] + head * strides[POOL_HEAD]
            store_slot(state, end_state, j, column, pool_k, pool_v)

    return kernel
