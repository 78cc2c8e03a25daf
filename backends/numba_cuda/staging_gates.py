"""Staging of the gates: one value per token (GDN), or one decay per K value and token (KDA).

Scalar gates are computed by one warp, a lane per token, so all tokens of a window at once.
"""

from __future__ import annotations

from typing import Any

from numba import cuda, float32

from .gates import beta_function, decay_function, growth_function
from .target import Function, Target, quad_words
from .variant import CHUNK, Variant

__all__ = ["stage_beta_of", "stage_decays_of"]


def stage_decays_of(variant: Variant, target: Target) -> Function:
    """``stage_decays`` of ``Staging``."""
    return _stage_kda(variant, target) if variant.kda else _stage_gdn(variant, target)


def stage_beta_of(variant: Variant, target: Target) -> Function:
    """``stage_beta`` of ``Staging``."""
    window, beta, decode = variant.window, beta_function(variant, target), target.decode(variant.b)

    @target.device
    def stage(buffer: Any, slot: Any, lane: Any, raw_b: Any, shared_beta: Any) -> Any:
        if slot == 0 and lane < window:
            shared_beta[buffer * window + lane] = beta(decode(raw_b[0]))

    return stage


def _stage_gdn(variant: Variant, target: Target) -> Function:
    window = variant.window
    decay, growth_of = decay_function(variant, target), growth_function(target)
    decode_a, decode_bias = target.decode(variant.a), target.decode(variant.dt_bias)
    decode_A_log = target.decode(variant.A_log)

    @target.device
    def stage(
        buffer: Any,
        slot: Any,
        lane: Any,
        raw_bias: Any,
        raw_A_log: Any,
        softplus_beta: Any,
        softplus_threshold: Any,
        lower_bound: Any,
        raw_a: Any,
        shared_decay: Any,
    ) -> Any:
        if slot == 0 and lane < window:
            A_log = decode_A_log(raw_A_log)
            growth = float32(growth_of(A_log))
            x = decode_a(raw_a[0]) + decode_bias(raw_bias[0])
            found = decay(x, A_log, growth, softplus_beta, softplus_threshold, lower_bound)
            shared_decay[buffer * window + lane] = found

    return stage


def _stage_kda(variant: Variant, target: Target) -> Function:
    slots, tokens, window = variant.slots, variant.window // variant.slots, variant.window
    padded, chunks, chunk = variant.padded_k, variant.chunks_per_warp_lane, CHUNK
    size, words = chunk * chunks, quad_words(variant.a)
    full = padded == 32 * size
    decay, growth_of = decay_function(variant, target), growth_function(target)
    decode, decode_bias = target.decode_quad(variant.a), target.decode(variant.dt_bias)
    decode_A_log, write = target.decode(variant.A_log), target.write_quad

    @target.device
    def stage(
        buffer: Any,
        slot: Any,
        lane: Any,
        raw_bias: Any,
        raw_A_log: Any,
        softplus_beta: Any,
        softplus_threshold: Any,
        lower_bound: Any,
        raw_a: Any,
        shared_decay: Any,
    ) -> Any:
        a = cuda.local.array(size, float32)
        A_log = decode_A_log(raw_A_log)
        growth = float32(growth_of(A_log))
        for i in range(tokens):
            for p in range(chunks):
                decode(raw_a, words * (chunks * i + p), a, chunk * p)
            for x in range(size):
                z = a[x] + decode_bias(raw_bias[x])
                a[x] = decay(z, A_log, growth, softplus_beta, softplus_threshold, lower_bound)
            base = (buffer * window + slot + slots * i) * padded
            for p in range(chunks):
                at = chunk * (lane + 32 * p)
                if full or at < padded:
                    write(shared_decay, base + at, a, chunk * p)

    return stage
