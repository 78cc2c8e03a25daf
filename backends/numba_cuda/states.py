"""Moving a lane's part of a state between global memory and registers: vectors where layout and alignment allow."""

from __future__ import annotations

from typing import Any

import numpy as np

from .target import Function, Target
from .variant import CHUNK, Variant

__all__ = ["clear_state", "load_state", "store_state"]

_ZERO = np.float32(0.0)
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def clear_state(variant: Variant, target: Target) -> Function:
    """``(state)``: the zero start."""
    size = variant.columns * variant.per_lane

    @target.pure
    def clear(state: Any) -> Any:
        for i in range(size):
            state[i] = _ZERO

    return clear


def load_state(variant: Variant, target: Target, dtype: str) -> Function:
    """``(state, address, j, column, k_stride, v_stride)``: this lane's part of the state at ``address``.

    ``column`` is the group's first column, strides are in bytes. What lies beyond K or V becomes 0 and is not read.
    """
    move = _mover(variant, target, dtype, storing=False)
    if variant.k % (CHUNK * variant.lanes) == 0 and variant.v % variant.tile == 0:
        return move
    clear = clear_state(variant, target)

    @target.device
    def load(state: Any, address: Any, j: Any, column: Any, k_stride: Any, v_stride: Any) -> Any:
        clear(state)
        move(state, address, j, column, k_stride, v_stride)

    return load


def store_state(variant: Variant, target: Target, dtype: str) -> Function:
    """``(state, address, j, column, k_stride, v_stride)``: the reverse, rounding to nearest even."""
    return _mover(variant, target, dtype, storing=True)


def _mover(variant: Variant, target: Target, dtype: str, storing: bool) -> Function:
    if variant.wide_k:
        return _along_k(variant, target, dtype, storing)
    if variant.wide_v:
        return _along_v(variant, target, dtype, storing)
    return _by_element(variant, target, dtype, storing)


def _along_k(variant: Variant, target: Target, dtype: str, storing: bool) -> Function:
    """K is contiguous: a chunk is one access."""
    columns, pieces, per_lane, lanes, chunk = (
        variant.columns,
        variant.pieces,
        variant.per_lane,
        variant.lanes,
        CHUNK,
    )
    key_dim, value_dim, item = variant.k, variant.v, _ITEM[dtype]
    all_k, all_v = variant.k % (CHUNK * variant.lanes) == 0, variant.v % variant.tile == 0
    move = _put_or_take(target, dtype, chunk, storing)

    @target.device
    def along_k(state: Any, address: Any, j: Any, column: Any, k_stride: Any, v_stride: Any) -> Any:
        for r in range(columns):
            if all_v or column + r < value_dim:
                row = address + (column + r) * v_stride
                for p in range(pieces):
                    at = chunk * (j + lanes * p)
                    if all_k or at < key_dim:
                        move(state, r * per_lane + p * chunk, 1, row + at * item)

    return along_k


def _along_v(variant: Variant, target: Target, dtype: str, storing: bool) -> Function:
    """V is contiguous: a group's columns of one K value are one access."""
    columns, pieces, per_lane, lanes, chunk = (
        variant.columns,
        variant.pieces,
        variant.per_lane,
        variant.lanes,
        CHUNK,
    )
    key_dim, value_dim, item = variant.k, variant.v, _ITEM[dtype]
    all_k, all_v = variant.k % (CHUNK * variant.lanes) == 0, variant.v % variant.tile == 0
    move = _put_or_take(target, dtype, columns, storing)

    @target.device
    def along_v(state: Any, address: Any, j: Any, column: Any, k_stride: Any, v_stride: Any) -> Any:
        if all_v or column < value_dim:
            row = address + column * item
            for p in range(pieces):
                for c in range(chunk):
                    at = chunk * (j + lanes * p) + c
                    if all_k or at < key_dim:
                        move(state, p * chunk + c, per_lane, row + at * k_stride)

    return along_v


def _by_element(variant: Variant, target: Target, dtype: str, storing: bool) -> Function:
    """Any strides, any alignment."""
    columns, pieces, per_lane, lanes, chunk = (
        variant.columns,
        variant.pieces,
        variant.per_lane,
        variant.lanes,
        CHUNK,
    )
    key_dim, value_dim = variant.k, variant.v
    all_k, all_v = variant.k % (CHUNK * variant.lanes) == 0, variant.v % variant.tile == 0
    load, store = target.load(dtype), target.store(dtype)

    @target.device
    def load_elements(state: Any, address: Any, j: Any, column: Any, k_stride: Any, v_stride: Any) -> Any:
        for r in range(columns):
            if all_v or column + r < value_dim:
                row = address + (column + r) * v_stride
                for p in range(pieces):
                    for c in range(chunk):
                        at = chunk * (j + lanes * p) + c
                        if all_k or at < key_dim:
                            state[r * per_lane + p * chunk + c] = load(row + at * k_stride)

    @target.device
    def store_elements(state: Any, address: Any, j: Any, column: Any, k_stride: Any, v_stride: Any) -> Any:
        for r in range(columns):
            if all_v or column + r < value_dim:
                row = address + (column + r) * v_stride
                for p in range(pieces):
                    for c in range(chunk):
                        at = chunk * (j + lanes * p) + c
                        if all_k or at < key_dim:
                            store(row + at * k_stride, state[r * per_lane + p * chunk + c])

    return store_elements if storing else load_elements


def _put_or_take(target: Target, dtype: str, n: int, storing: bool) -> Function:
    """``(state, first, step, address)``: one vector between memory and ``n`` registers ``step`` apart.

    Written out per width: a tuple indexed by a loop variable would go through local memory.
    """
    load, store = target.load_vector(dtype, n), target.store_vector(dtype, n)

    @target.device
    def load_2(state: Any, first: Any, step: Any, address: Any) -> Any:
        x = load(address)
        state[first] = x[0]
        state[first + step] = x[1]

    @target.device
    def load_4(state: Any, first: Any, step: Any, address: Any) -> Any:
        x = load(address)
        state[first] = x[0]
        state[first + step] = x[1]
        state[first + 2 * step] = x[2]
        state[first + 3 * step] = x[3]

    @target.device
    def load_8(state: Any, first: Any, step: Any, address: Any) -> Any:
        x = load(address)
        state[first] = x[0]
        state[first + step] = x[1]
        state[first + 2 * step] = x[2]
        state[first + 3 * step] = x[3]
        state[first + 4 * step] = x[4]
        state[first + 5 * step] = x[5]
        state[first + 6 * step] = x[6]
        state[first + 7 * step] = x[7]

    @target.device
    def store_2(state: Any, first: Any, step: Any, address: Any) -> Any:
        store(address, (state[first], state[first + step]))

    @target.device
    def store_4(state: Any, first: Any, step: Any, address: Any) -> Any:
        store(address, (state[first], state[first + step], state[first + 2 * step], state[first + 3 * step]))

    @target.device
    def store_8(state: Any, first: Any, step: Any, address: Any) -> Any:
        store(
            address,
            (
                state[first],
                state[first + step],
                state[first + 2 * step],
                state[first + 3 * step],
                state[first + 4 * step],
                state[first + 5 * step],
                state[first + 6 * step],
                state[first + 7 * step],
            ),
        )

    loads, stores = {2: load_2, 4: load_4, 8: load_8}, {2: store_2, 4: store_4, 8: store_8}
    return stores[n] if storing else loads[n]
