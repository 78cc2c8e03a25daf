"""What a lane does with its part of the state in registers: predict, update, read out. Pure array code, no CUDA.

A lane holds ``columns`` columns of ``per_lane`` K values: ``state[r * per_lane + i]``. Loops have constant bounds and
unroll completely; an index that is not constant after unrolling would put the arrays into local memory.

Every sum over K is a tree over chunks: four values in sequence, then chunks half the (padded) count apart, a quarter
apart, and so on; ``reduce`` continues the same tree across lanes. So neither the number of lanes nor anything else but
K decides the order, and no config changes a bit.
"""

from __future__ import annotations

from typing import Any

from .target import Function, Target
from .variant import CHUNK, Variant

__all__ = ["column_sums", "gdn_update", "kda_update", "scaled_key"]


def column_sums(variant: Variant, target: Target) -> Function:
    """``(state, vector, sums, out)``: this lane's part of ``state^T vector``; ``sums`` is scratch for the chunks."""
    columns, pieces, per_lane = variant.columns, variant.pieces, variant.per_lane
    chunk = CHUNK
    fma = target.fma
    stages = (pieces - 1).bit_length()

    @target.pure
    def part(state: Any, vector: Any, sums: Any, out: Any) -> Any:
        for r in range(columns):
            for p in range(pieces):
                at = p * chunk
                x = state[r * per_lane + at] * vector[at]
                x = fma(state[r * per_lane + at + 1], vector[at + 1], x)
                x = fma(state[r * per_lane + at + 2], vector[at + 2], x)
                sums[p] = fma(state[r * per_lane + at + 3], vector[at + 3], x)
            for stage in range(stages):
                half = 1 << (stages - 1 - stage)
                for i in range(half):
                    if half + i < pieces:
                        sums[i] += sums[half + i]
            out[r] = sums[0]

    return part


def gdn_update(variant: Variant, target: Target) -> Function:
    """``(state, key, change, decay, decays)``: ``S = decay * S + key change^T``, one decay for all of K."""
    columns, per_lane = variant.columns, variant.per_lane
    fma = target.fma

    @target.pure
    def update(state: Any, key: Any, change: Any, decay: Any, decays: Any) -> Any:
        for r in range(columns):
            for i in range(per_lane):
                at = r * per_lane + i
                state[at] = fma(key[i], change[r], decay * state[at])

    return update


def kda_update(variant: Variant, target: Target) -> Function:
    """``(state, key, change, decay, decays)``: ``S = diag(decays) S + key change^T``."""
    columns, per_lane = variant.columns, variant.per_lane
    fma = target.fma

    @target.pure
    def update(state: Any, key: Any, change: Any, decay: Any, decays: Any) -> Any:
        for r in range(columns):
            for i in range(per_lane):
                at = r * per_lane + i
                state[at] = fma(key[i], change[r], decays[i] * state[at])

    return update


def scaled_key(variant: Variant, target: Target) -> Function:
    """``(key, decays, out)``: with it, ``(diag(decays) S)^T key`` needs no pass over the state."""
    per_lane = variant.per_lane

    @target.pure
    def scale(key: Any, decays: Any, out: Any) -> Any:
        for i in range(per_lane):
            out[i] = decays[i] * key[i]

    return scale
