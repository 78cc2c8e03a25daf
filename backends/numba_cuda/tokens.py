"""Small per-token moves: dt_bias into registers, staged vectors into registers, outputs out of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .target import Function, Target
from .variant import CHUNK, Variant

__all__ = ["biases_of", "put_output_of", "read_vector_of"]

_NOTHING = np.uint32(0)  # the bits of 0 in every format


def biases_of(variant: Variant, target: Target) -> Function:
    """``(address, lane, inner, out)``: dt_bias of a head, or of the lane's K values, undecoded."""
    load = target.load_raw(variant.dt_bias)
    key_dim, kda = variant.k, variant.kda
    count = -(-variant.padded_k // 32) if kda else 1

    @target.device
    def biases(address: Any, lane: Any, inner: Any, out: Any) -> Any:
        for x in range(count):
            at = lane + 32 * x if kda else 0
            out[x] = load(address + at * inner) if at < key_dim else _NOTHING

    return biases


def read_vector_of(variant: Variant, target: Target) -> Function:
    """``(shared, base, j, out)``: this lane's values of a staged vector."""
    pieces, lanes, chunk = variant.pieces, variant.lanes, CHUNK
    quad = target.shared_quad

    @target.device
    def read(shared: Any, base: Any, j: Any, out: Any) -> Any:
        for p in range(pieces):
            x = quad(shared, base + chunk * (j + lanes * p))
            out[chunk * p] = x[0]
            out[chunk * p + 1] = x[1]
            out[chunk * p + 2] = x[2]
            out[chunk * p + 3] = x[3]

    return read


def put_output_of(variant: Variant, target: Target) -> Function:
    """``(address, column, inner, held, outputs)``: store the outputs that this lane holds."""
    count = max(1, variant.columns // variant.lanes)
    value_dim = variant.v
    full = variant.v % variant.tile == 0
    store = target.store(variant.io)

    @target.device
    def put(address: Any, column: Any, inner: Any, holds: Any, outputs: Any) -> Any:
        if holds:
            for i in range(count):
                if full or column + i < value_dim:
                    store(address + (column + i) * inner, outputs[i])

    return put
