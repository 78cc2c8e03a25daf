"""Staging of the gates: one value per token (GDN), or one decay per K value and token (KDA).

Scalar gates are computed by one lane per token, so all tokens of a warp at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32

from .gates import beta_function, decay_function, growth_function
from .target import Function, Target
from .variant import WARP, Variant

__all__ = ["fetch_gates_of", "stage_gates_of"]

_NOTHING = np.uint32(0)  # the bits of 0 in every format


def fetch_gates_of(variant: Variant, target: Target) -> Function:
    """``fetch_gates`` of ``Staging``."""
    return _fetch_kda(variant, target) if variant.kda else _fetch_gdn(variant, target)


def stage_gates_of(variant: Variant, target: Target) -> Function:
    """``stage_gates`` of ``Staging``."""
    return _stage_kda(variant, target) if variant.kda else _stage_gdn(variant, target)


def _fetch_gdn(variant: Variant, target: Target) -> Function:
    """Lane ``i`` takes the gates of the warp's token ``i``."""
    tokens, warps = variant.window // variant.warps, variant.warps
    load_a, load_b = target.load_raw(variant.a), target.load_raw(variant.b)

    @target.device
    def fetch(
        first: Any,
        length: Any,
        warp: Any,
        lane: Any,
        a: Any,
        b: Any,
        a_token: Any,
        b_token: Any,
        a_inner: Any,
        raw_a: Any,
        raw_b: Any,
    ) -> Any:
        t = first + warp + warps * lane
        if lane < tokens and t < length:
            raw_a[0] = load_a(a + t * a_token)
            raw_b[0] = load_b(b + t * b_token)

    return fetch


def _fetch_kda(variant: Variant, target: Target) -> Function:
    tokens, warps, key_dim = variant.window // variant.warps, variant.warps, variant.k
    each = -(-variant.padded_k // WARP)
    full = variant.k == each * WARP
    load_a, load_b = target.load_raw(variant.a), target.load_raw(variant.b)

    @target.device
    def fetch(
        first: Any,
        length: Any,
        warp: Any,
        lane: Any,
        a: Any,
        b: Any,
        a_token: Any,
        b_token: Any,
        a_inner: Any,
        raw_a: Any,
        raw_b: Any,
    ) -> Any:
        for i in range(tokens):
            t = first + warp + warps * i
            if t < length:
                for x in range(each):
                    at = lane + 32 * x
                    if full or at < key_dim:
                        raw_a[i * each + x] = load_a(a + t * a_token + at * a_inner)
                    else:
                        raw_a[i * each + x] = _NOTHING
        t = first + warp + warps * lane
        if lane < tokens and t < length:
            raw_b[0] = load_b(b + t * b_token)

    return fetch


def _stage_gdn(variant: Variant, target: Target) -> Function:
    tokens, warps, window = variant.window // variant.warps, variant.warps, variant.window
    decay, beta, growth_of = decay_function(variant, target), beta_function(variant, target), growth_function(target)
    decode_a, decode_b = target.decode(variant.a), target.decode(variant.b)
    decode_A_log, decode_bias = target.decode(variant.A_log), target.decode(variant.dt_bias)

    @target.device
    def stage(
        first: Any,
        length: Any,
        buffer: Any,
        warp: Any,
        lane: Any,
        raw_bias: Any,
        raw_A_log: Any,
        softplus_beta: Any,
        softplus_threshold: Any,
        lower_bound: Any,
        raw_a: Any,
        raw_b: Any,
        shared_decay: Any,
        shared_beta: Any,
    ) -> Any:
        A_log = decode_A_log(raw_A_log)
        growth = float32(growth_of(A_log))
        if lane < tokens and first + warp + warps * lane < length:
            at = buffer * window + warp + warps * lane
            x = decode_a(raw_a[0]) + decode_bias(raw_bias[0])
            shared_decay[at] = decay(x, A_log, growth, softplus_beta, softplus_threshold, lower_bound)
            shared_beta[at] = beta(decode_b(raw_b[0]))

    return stage


def _stage_kda(variant: Variant, target: Target) -> Function:
    tokens, warps, window = variant.window // variant.warps, variant.warps, variant.window
    padded = variant.padded_k
    each = -(-variant.padded_k // WARP)
    full = padded == each * WARP
    decay, beta, growth_of = decay_function(variant, target), beta_function(variant, target), growth_function(target)
    decode_a, decode_b = target.decode(variant.a), target.decode(variant.b)
    decode_A_log, decode_bias = target.decode(variant.A_log), target.decode(variant.dt_bias)

    @target.device
    def stage(
        first: Any,
        length: Any,
        buffer: Any,
        warp: Any,
        lane: Any,
        raw_bias: Any,
        raw_A_log: Any,
        softplus_beta: Any,
        softplus_threshold: Any,
        lower_bound: Any,
        raw_a: Any,
        raw_b: Any,
        shared_decay: Any,
        shared_beta: Any,
    ) -> Any:
        A_log = decode_A_log(raw_A_log)
        growth = float32(growth_of(A_log))
        for i in range(tokens):
            if first + warp + warps * i < length:
                base = (buffer * window + warp + warps * i) * padded
                for x in range(each):
                    at = lane + 32 * x
                    if full or at < padded:
                        z = decode_a(raw_a[i * each + x]) + decode_bias(raw_bias[x])
                        shared_decay[base + at] = decay(
                            z, A_log, growth, softplus_beta, softplus_threshold, lower_bound
                        )
        if lane < tokens and first + warp + warps * lane < length:
            shared_beta[buffer * window + warp + warps * lane] = beta(decode_b(raw_b[0]))

    return stage
