"""Staging: the next window's tokens, from global memory to registers early, normalised into shared memory late.

Warp ``w`` takes tokens ``w``, ``w + warps``, ... of a window: its 32 lanes share out K and the block's columns of v.
``fetch`` only issues loads; ``stage`` uses them, one window of arithmetic later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda, float32

from .staging_gates import fetch_gates_of, stage_gates_of
from .target import Function, Target
from .variant import WARP, Variant

__all__ = ["Staging", "staging"]

_NOTHING = np.uint32(0)  # the bits of 0 in every format
_EPSILON = np.float32(1e-6)
_ONE = np.float32(1.0)


@dataclass(frozen=True, slots=True)
class Staging:
    """Functions that bring tokens in, and the sizes of the register arrays (of uint32) they use.

    Attributes:
        fetch_vectors: ``(first, length, warp, lane, q, k, q_token, k_token, q_inner, k_inner, raw_q, raw_k)``.
        fetch_values: ``(first, length, warp, lane, v, v_token, v_inner, column, raw_v)``.
        fetch_gates: ``(first, length, warp, lane, a, b, a_token, b_token, a_inner, raw_a, raw_b)``.
        stage_vectors: ``(first, length, buffer, warp, lane, scale, raw_q, raw_k, shared_q, shared_k)``.
        stage_values: ``(first, length, buffer, warp, lane, raw_v, shared_v)``.
        stage_gates: ``(first, length, buffer, warp, lane, raw_bias, raw_A_log, softplus_beta, softplus_threshold,
            lower_bound, raw_a, raw_b, shared_decay, shared_beta)``.
        vectors, values, gates: elements of raw_q and raw_k, of raw_v, and of raw_a.
        biases: elements of ``raw_bias``: one, or with KDA one per K value of the lane.
    """

    fetch_vectors: Function
    fetch_values: Function
    fetch_gates: Function
    stage_vectors: Function
    stage_values: Function
    stage_gates: Function
    vectors: int
    values: int
    gates: int
    biases: int


def staging(variant: Variant, target: Target) -> Staging:
    """The functions for one variant."""
    tokens = variant.window // variant.warps
    vectors, values = -(-variant.padded_k // WARP), -(-variant.tile // WARP)
    return Staging(
        fetch_vectors=_fetch_vectors(variant, target),
        fetch_values=_fetch_values(variant, target),
        fetch_gates=fetch_gates_of(variant, target),
        stage_vectors=_stage_vectors(variant, target),
        stage_values=_stage_values(variant, target),
        stage_gates=stage_gates_of(variant, target),
        vectors=tokens * vectors,
        values=tokens * values,
        gates=tokens * vectors if variant.kda else 1,
        biases=vectors if variant.kda else 1,
    )


def _fetch_vectors(variant: Variant, target: Target) -> Function:
    tokens, warps, key_dim = variant.window // variant.warps, variant.warps, variant.k
    each = -(-variant.padded_k // WARP)
    full = variant.k == each * WARP
    load = target.load_raw(variant.io)

    @target.device
    def fetch(
        first: Any,
        length: Any,
        warp: Any,
        lane: Any,
        q: Any,
        k: Any,
        q_token: Any,
        k_token: Any,
        q_inner: Any,
        k_inner: Any,
        raw_q: Any,
        raw_k: Any,
    ) -> Any:
        for i in range(tokens):
            t = first + warp + warps * i
            if t < length:
                for x in range(each):
                    at = lane + 32 * x
                    if full or at < key_dim:
                        raw_k[i * each + x] = load(k + t * k_token + at * k_inner)
                        raw_q[i * each + x] = load(q + t * q_token + at * q_inner)
                    else:
                        raw_k[i * each + x] = _NOTHING
                        raw_q[i * each + x] = _NOTHING

    return fetch


def _fetch_values(variant: Variant, target: Target) -> Function:
    tokens, warps, tile, value_dim = variant.window // variant.warps, variant.warps, variant.tile, variant.v
    each = -(-variant.tile // WARP)
    full = variant.tile == each * WARP and variant.v % variant.tile == 0
    load = target.load_raw(variant.io)

    @target.device
    def fetch(
        first: Any, length: Any, warp: Any, lane: Any, v: Any, v_token: Any, v_inner: Any, column: Any, raw_v: Any
    ) -> Any:
        for i in range(tokens):
            t = first + warp + warps * i
            if t < length:
                for x in range(each):
                    at = lane + 32 * x
                    if full or (at < tile and column + at < value_dim):
                        raw_v[i * each + x] = load(v + t * v_token + (column + at) * v_inner)
                    else:
                        raw_v[i * each + x] = _NOTHING

    return fetch


def _inverse_norms(target: Target) -> Function:
    """``(q, k, count, factors, received)``: ``1 / sqrt(sum of squares + 1e-6)`` of q and of k over the warp's lanes."""
    fma, rsqrt = target.fma, target.rsqrt
    exchange = target.exchange(2)

    @target.pure
    def own_squares(q: Any, k: Any, count: Any, squares: Any) -> Any:
        squares[0] = q[0] * q[0]
        squares[1] = k[0] * k[0]
        for x in range(1, count):
            squares[0] = fma(q[x], q[x], squares[0])
            squares[1] = fma(k[x], k[x], squares[1])

    @target.device
    def inverse_norms(q: Any, k: Any, count: Any, factors: Any, received: Any) -> Any:
        own_squares(q, k, count, factors)
        for stage in range(5):
            exchange(factors, 16 >> stage, received)
            factors[0] += received[0]
            factors[1] += received[1]
        factors[0] = rsqrt(factors[0] + _EPSILON)
        factors[1] = rsqrt(factors[1] + _EPSILON)

    return inverse_norms


def _stage_vectors(variant: Variant, target: Target) -> Function:
    tokens, warps, window = variant.window // variant.warps, variant.warps, variant.window
    padded, l2norm = variant.padded_k, variant.l2norm
    each = -(-variant.padded_k // WARP)
    full = padded == each * WARP
    decode, inverse_norms = target.decode(variant.io), _inverse_norms(target)

    @target.device
    def stage(
        first: Any,
        length: Any,
        buffer: Any,
        warp: Any,
        lane: Any,
        scale: Any,
        raw_q: Any,
        raw_k: Any,
        shared_q: Any,
        shared_k: Any,
    ) -> Any:
        q = cuda.local.array(each, float32)
        k = cuda.local.array(each, float32)
        factors = cuda.local.array(2, float32)
        received = cuda.local.array(2, float32)
        for i in range(tokens):
            if first + warp + warps * i < length:
                for x in range(each):
                    q[x] = decode(raw_q[i * each + x])
                    k[x] = decode(raw_k[i * each + x])
                if l2norm:
                    inverse_norms(q, k, each, factors, received)
                else:
                    factors[0] = _ONE
                    factors[1] = _ONE
                q_factor = factors[0] * scale
                base = (buffer * window + warp + warps * i) * padded
                for x in range(each):
                    at = lane + 32 * x
                    if full or at < padded:
                        shared_k[base + at] = k[x] * factors[1]
                        shared_q[base + at] = q[x] * q_factor

    return stage


def _stage_values(variant: Variant, target: Target) -> Function:
    tokens, warps, window, tile = variant.window // variant.warps, variant.warps, variant.window, variant.tile
    each = -(-variant.tile // WARP)
    full = tile == each * WARP
    decode = target.decode(variant.io)

    @target.device
    def stage(first: Any, length: Any, buffer: Any, warp: Any, lane: Any, raw_v: Any, shared_v: Any) -> Any:
        for i in range(tokens):
            if first + warp + warps * i < length:
                base = (buffer * window + warp + warps * i) * tile
                for x in range(each):
                    at = lane + 32 * x
                    if full or at < tile:
                        shared_v[base + at] = decode(raw_v[i * each + x])

    return stage
