"""Small per-token moves: dt_bias into registers, staged vectors into registers, outputs out of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .target import Function, Target
from .variant import CHUNK, WARP, Variant

__all__ = ["biases_of", "put_output_of", "read_values_of", "read_vector_of"]

_NOTHING = np.uint32(0)  # the bits of 0 in every format


def biases_of(variant: Variant, target: Target) -> Function:
    """``(address, lane, inner, out)``: dt_bias of a head, or of the K values the lane stages, undecoded."""
    load = target.load_raw(variant.dt_bias)
    key_dim, kda, chunk = variant.k, variant.kda, CHUNK
    count = chunk * variant.chunks_per_warp_lane if kda else 1

    @target.device
    def biases(address: Any, lane: Any, inner: Any, out: Any) -> Any:
        for x in range(count):
            at = chunk * (lane + WARP * (x // chunk)) + x % chunk if kda else 0
            out[x] = load(address + at * inner) if at < key_dim else _NOTHING

    return biases


def read_vector_of(variant: Variant, target: Target) -> Function:
    """``(shared, base, j, out)``: this lane's values of a staged vector."""
    pieces, lanes, chunk = variant.pieces, variant.lanes, CHUNK
    read_quad = target.read_quad

    @target.device
    def read(shared: Any, base: Any, j: Any, out: Any) -> Any:
        for p in range(pieces):
            read_quad(shared, base + chunk * (j + lanes * p), out, chunk * p)

    return read


def read_values_of(variant: Variant, target: Target) -> Function:
    """``(shared, at, out)``: v of the group's columns, the first of which is staged at ``at``."""
    columns = variant.columns
    quads = columns // 4 if columns % 4 == 0 else 0
    read_quad, read_one = target.read_quad, target.read_one

    @target.device
    def read(shared: Any, at: Any, out: Any) -> Any:
        for x in range(quads):
            read_quad(shared, at + 4 * x, out, 4 * x)
        for r in range(4 * quads, columns):
            out[r] = read_one(shared, at + r)

    return read


def put_output_of(variant: Variant, target: Target) -> Function:
    """``(address, column, inner, holds, outputs)``: store the outputs this lane holds; ``address``: of the first."""
    count = max(1, variant.columns // variant.lanes)
    value_dim = variant.v
    full = variant.v % variant.tile == 0
    store = target.store(variant.io)

    @target.device
    def put(address: Any, column: Any, inner: Any, holds: Any, outputs: Any) -> Any:
        if holds:
            for i in range(count):
                if full or column + i < value_dim:
                    store(address + i * inner, outputs[i])

    return put
