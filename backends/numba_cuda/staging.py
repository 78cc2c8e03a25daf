"""Staging: the next window's tokens, from global memory to registers early, normalised into shared memory late.

Of the warps that stage, warp ``slot`` takes tokens ``slot``, ``slot + slots``, ... of a window: its 32 lanes share out
K and the block's columns of v. ``fetch`` only issues loads; ``stage`` uses them, one window of arithmetic later. Tokens
beyond the sequence's length are not read; zeros are staged for them, which costs less than branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda, float32

from .places import A_TOKEN, B_TOKEN, K_TOKEN, Q_TOKEN, V_TOKEN
from .rows import fetch_row, squares
from .staging_gates import stage_beta_of, stage_decays_of
from .target import Function, Target, quad_words
from .variant import CHUNK, WARP, Variant

__all__ = ["Staging", "staging"]

_NOTHING = np.uint32(0)  # the bits of 0 in every format
_EPSILON = np.float32(1e-6)
_ONE = np.float32(1.0)


@dataclass(frozen=True, slots=True)
class Staging:
    """Functions that bring a window of tokens in, and the sizes of the register arrays (of uint32) they use.

    Attributes:
        fetch: ``(first, length, slot, lane, first_column, q, k, v, a, b, strides, q_inner, k_inner, v_inner, a_inner,
            aligned, aligned_a, raw_q, raw_k, raw_v, raw_a, raw_b)``: the window from token ``first`` on; ``q`` to ``b``
            are addresses of token 0, aligned: see ``rows.misaligned``.
        stage: ``(buffer, slot, lane, scale, softplus_beta, softplus_threshold, lower_bound, raw_q, raw_k, raw_v, raw_a,
            raw_b, raw_A_log, raw_bias, shared_q, shared_k, shared_v, shared_decay, shared_beta)``.
        rows, values, decays: elements of raw_q and raw_k, of raw_v, and of raw_a; raw_b has one.
        biases: elements of ``raw_bias``: one, or with KDA one per K value of the lane.
    """

    fetch: Function
    stage: Function
    rows: int
    values: int
    decays: int
    biases: int


def staging(variant: Variant, target: Target) -> Staging:
    """The functions for one variant."""
    tokens = variant.window // variant.slots
    chunks = variant.chunks_per_warp_lane
    return Staging(
        fetch=_fetch(variant, target),
        stage=_stage(variant, target),
        rows=tokens * chunks * quad_words(variant.io),
        values=tokens * -(-variant.tile // WARP),
        decays=tokens * chunks * quad_words(variant.a) if variant.kda else 1,
        biases=CHUNK * chunks if variant.kda else 1,
    )


def _fetch(variant: Variant, target: Target) -> Function:
    """Rows, values and gates by different warps where there are several: they wait side by side."""
    slots, kda = variant.slots, variant.kda
    fetch_rows, fetch_values = _fetch_rows(variant, target, variant.io), _fetch_values(variant, target)
    fetch_a = (_fetch_rows if kda else _fetch_scalars)(variant, target, variant.a)
    fetch_b = _fetch_scalars(variant, target, variant.b)

    @target.device
    def fetch(
        first: Any,
        length: Any,
        slot: Any,
        lane: Any,
        first_column: Any,
        q: Any,
        k: Any,
        v: Any,
        a: Any,
        b: Any,
        strides: Any,
        q_inner: Any,
        k_inner: Any,
        v_inner: Any,
        a_inner: Any,
        aligned: Any,
        aligned_a: Any,
        raw_q: Any,
        raw_k: Any,
        raw_v: Any,
        raw_a: Any,
        raw_b: Any,
    ) -> Any:
        gate_slot = (slot + 1) % slots
        value_slot = (slot + 2) % slots
        fetch_rows(first, length, slot, lane, k, strides[K_TOKEN], k_inner, aligned, raw_k)
        fetch_rows(first, length, slot, lane, q, strides[Q_TOKEN], q_inner, aligned, raw_q)
        fetch_a(first, length, slot if kda else gate_slot, lane, a, strides[A_TOKEN], a_inner, aligned_a, raw_a)
        fetch_b(first, length, gate_slot, lane, b, strides[B_TOKEN], 0, False, raw_b)
        fetch_values(first, length, value_slot, lane, v, strides[V_TOKEN], v_inner, first_column, raw_v)

    return fetch


def _stage(variant: Variant, target: Target) -> Function:
    slots, kda = variant.slots, variant.kda
    stage_rows, stage_values = _stage_rows(variant, target), _stage_values(variant, target)
    stage_decays, stage_beta = stage_decays_of(variant, target), stage_beta_of(variant, target)

    @target.device
    def stage(
        buffer: Any,
        slot: Any,
        lane: Any,
        scale: Any,
        softplus_beta: Any,
        softplus_threshold: Any,
        lower_bound: Any,
        raw_q: Any,
        raw_k: Any,
        raw_v: Any,
        raw_a: Any,
        raw_b: Any,
        raw_A_log: Any,
        raw_bias: Any,
        shared_q: Any,
        shared_k: Any,
        shared_v: Any,
        shared_decay: Any,
        shared_beta: Any,
    ) -> Any:
        gate_slot = (slot + 1) % slots
        value_slot = (slot + 2) % slots
        stage_rows(buffer, slot, lane, scale, raw_q, raw_k, shared_q, shared_k)
        stage_values(buffer, value_slot, lane, raw_v, shared_v)
        stage_beta(buffer, gate_slot, lane, raw_b, shared_beta)
        stage_decays(
            buffer,
            slot if kda else gate_slot,
            lane,
            raw_bias,
            raw_A_log,
            softplus_beta,
            softplus_threshold,
            lower_bound,
            raw_a,
            shared_decay,
        )

    return stage


def _fetch_rows(variant: Variant, target: Target, dtype: str) -> Function:
    slots, tokens = variant.slots, variant.window // variant.slots
    chunks = variant.chunks_per_warp_lane
    words = chunks * quad_words(dtype)
    fetch = fetch_row(variant, target, dtype, chunks, WARP)

    @target.device
    def fetch_all(
        first: Any,
        length: Any,
        slot: Any,
        lane: Any,
        address: Any,
        token_stride: Any,
        inner: Any,
        aligned: Any,
        raw: Any,
    ) -> Any:
        for i in range(tokens):
            t = first + slot + slots * i
            if t < length:
                fetch(address + t * token_stride, inner, aligned, lane, raw, words * i)
            else:
                for x in range(words):
                    raw[words * i + x] = _NOTHING

    return fetch_all


def _fetch_values(variant: Variant, target: Target) -> Function:
    slots, tokens, tile, value_dim = variant.slots, variant.window // variant.slots, variant.tile, variant.v
    each = -(-variant.tile // WARP)
    full = variant.tile == each * WARP and variant.v % variant.tile == 0
    load = target.load_raw(variant.io)

    @target.device
    def fetch(
        first: Any, length: Any, slot: Any, lane: Any, v: Any, v_token: Any, v_inner: Any, column: Any, raw_v: Any
    ) -> Any:
        for i in range(tokens):
            t = first + slot + slots * i
            for x in range(each):
                at = lane + 32 * x
                bits = _NOTHING
                if t < length and (full or (at < tile and column + at < value_dim)):
                    bits = load(v + t * v_token + (column + at) * v_inner)
                raw_v[i * each + x] = bits

    return fetch


def _fetch_scalars(variant: Variant, target: Target, dtype: str) -> Function:
    """Lane ``i`` takes the window's token ``i``; one warp does it all, and its lanes compute all gates at once."""
    window = variant.window
    load = target.load_raw(dtype)

    @target.device
    def fetch(
        first: Any,
        length: Any,
        slot: Any,
        lane: Any,
        address: Any,
        token_stride: Any,
        inner: Any,
        aligned: Any,
        raw: Any,
    ) -> Any:
        t = first + lane
        bits = _NOTHING
        if slot == 0 and lane < window and t < length:
            bits = load(address + t * token_stride)
        raw[0] = bits

    return fetch


def _stage_rows(variant: Variant, target: Target) -> Function:
    slots, tokens, window = variant.slots, variant.window // variant.slots, variant.window
    padded, l2norm, chunks, chunk = variant.padded_k, variant.l2norm, variant.chunks_per_warp_lane, CHUNK
    words = quad_words(variant.io)
    size, sums_of, norms = chunk * chunks, squares(target, chunks), 2 * tokens
    full = padded == WARP * size
    decode, write, rsqrt = target.decode_quad(variant.io), target.write_quad, target.rsqrt
    exchange = target.exchange(norms)

    @target.device
    def stage(
        buffer: Any, slot: Any, lane: Any, scale: Any, raw_q: Any, raw_k: Any, shared_q: Any, shared_k: Any
    ) -> Any:
        q = cuda.local.array(size, float32)
        k = cuda.local.array(size, float32)
        sums = cuda.local.array(chunks, float32)
        factors = cuda.local.array(norms, float32)
        received = cuda.local.array(norms, float32)
        for i in range(norms):
            factors[i] = _ONE
        if l2norm:
            # All tokens' norms together: their shuffles wait for each other's answers, not one after the other.
            for i in range(tokens):
                for p in range(chunks):
                    decode(raw_q, words * (chunks * i + p), q, chunk * p)
                    decode(raw_k, words * (chunks * i + p), k, chunk * p)
                factors[2 * i] = sums_of(q, sums)
                factors[2 * i + 1] = sums_of(k, sums)
            for step in range(5):
                exchange(factors, 16 >> step, received)
                for i in range(norms):
                    factors[i] += received[i]
            for i in range(norms):
                factors[i] = rsqrt(factors[i] + _EPSILON)
        for i in range(tokens):
            for p in range(chunks):
                decode(raw_q, words * (chunks * i + p), q, chunk * p)
                decode(raw_k, words * (chunks * i + p), k, chunk * p)
            q_factor = factors[2 * i] * scale
            k_factor = factors[2 * i + 1]
            for x in range(size):
                q[x] *= q_factor
                k[x] *= k_factor
            base = (buffer * window + slot + slots * i) * padded
            for p in range(chunks):
                at = chunk * (lane + 32 * p)
                if full or at < padded:
                    write(shared_q, base + at, q, chunk * p)
                    write(shared_k, base + at, k, chunk * p)

    return stage


def _stage_values(variant: Variant, target: Target) -> Function:
    slots, tokens, window, tile = variant.slots, variant.window // variant.slots, variant.window, variant.tile
    each = -(-variant.tile // WARP)
    full = tile == each * WARP
    decode = target.decode(variant.io)

    @target.device
    def stage(buffer: Any, slot: Any, lane: Any, raw_v: Any, shared_v: Any) -> Any:
        for i in range(tokens):
            base = (buffer * window + slot + slots * i) * tile
            for x in range(each):
                at = lane + 32 * x
                if full or at < tile:
                    shared_v[base + at] = decode(raw_v[i * each + x])

    return stage
