"""Moving a lane's part of a state between global memory and registers: vectors where layout and alignment allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .target import Function, Target
from .variant import CHUNK, ITEM, Variant

__all__ = ["clear_state", "load_state", "store_state"]

_ZERO = np.float32(0.0)


def clear_state(variant: Variant, target: Target) -> Function:
    """``(state)``: the zero start."""
    size = variant.columns * variant.per_lane

    @target.pure
    def clear(state: Any) -> Any:
        for i in range(size):
            state[i] = _ZERO

    return clear


def load_state(variant: Variant, target: Target, dtype: str, streaming: bool = False) -> Function:
    """``(state, address, j, column, k_stride, v_stride)``: this lane's part of the state at ``address``.

    ``column`` is the group's first column, strides are in bytes. What lies beyond K or V becomes 0 and is not read.
    """
    load = target.load(dtype)

    @target.device
    def load_one(address: Any, state: Any, at: Any, step: Any) -> Any:
        state[at] = load(address)

    move = _mover(variant, target, dtype, lambda n: target.load_vector(dtype, n, streaming), load_one)
    if variant.k % (CHUNK * variant.lanes) == 0 and variant.v % variant.tile == 0:
        return move
    clear = clear_state(variant, target)

    @target.device
    def load_part(state: Any, address: Any, j: Any, column: Any, k_stride: Any, v_stride: Any) -> Any:
        clear(state)
        move(state, address, j, column, k_stride, v_stride)

    return load_part


def store_state(variant: Variant, target: Target, dtype: str, streaming: bool = False) -> Function:
    """``(state, address, j, column, k_stride, v_stride)``: the reverse, rounding to nearest even."""
    store = target.store(dtype)

    @target.device
    def store_one(address: Any, state: Any, at: Any, step: Any) -> Any:
        store(address, state[at])

    return _mover(variant, target, dtype, lambda n: target.store_vector(dtype, n, streaming), store_one)


def _mover(
    variant: Variant, target: Target, dtype: str, vector: Callable[[int], Function], element: Function
) -> Function:
    """Calls ``move(address, state, first, step)`` for every run of this lane's values that is one access.

    Along K a chunk of a column is one, along V the columns of one K value are; ``element`` moves single values.
    """
    columns, pieces, per_lane, lanes = variant.columns, variant.pieces, variant.per_lane, variant.lanes
    key_dim, value_dim = variant.k, variant.v
    all_k, all_v = variant.k % (CHUNK * variant.lanes) == 0, variant.v % variant.tile == 0
    # A run: so many columns, and so many values of a chunk.
    wide_columns = columns if variant.wide_v else 1
    wide_keys = CHUNK if variant.wide_k else 1
    moves, keys = columns // wide_columns, CHUNK // wide_keys
    step = per_lane if variant.wide_v else 1
    # Innermost strides that are constants become immediates in the loads.
    packed, item = variant.wide_k or variant.wide_v, ITEM[dtype]
    fixed_k, fixed_v = (item, variant.k * item) if variant.layout == "vk" else (variant.v * item, item)
    move = vector(max(wide_columns, wide_keys)) if packed else element
    chunk = CHUNK

    @target.device
    def moved(state: Any, address: Any, j: Any, column: Any, k_stride: Any, v_stride: Any) -> Any:
        along_k = fixed_k if packed else k_stride
        along_v = fixed_v if packed else v_stride
        own = address + column * along_v + chunk * j * along_k
        for r in range(moves):
            if all_v or column + r * wide_columns < value_dim:
                for p in range(pieces):
                    for c in range(keys):
                        at = chunk * lanes * p + c
                        if all_k or chunk * j + at < key_dim:
                            first = r * wide_columns * per_lane + p * chunk + c
                            move(own + (r * along_v + at * along_k), state, first, step)

    return moved
