"""A chunk of one head's tokens, made ready: what every V tile of the head needs, computed once and kept in cache.

Per token four float32 rows of K (decay * k, decay, k, q; normalised and scaled), one row of values and one beta. The
chunk is a few dozen tokens, so its rows stay in the second-level cache and no buffer grows with the prompt.
"""

from __future__ import annotations

import math

from . import parameters as at
from .emit import inlined, jit
from .parameters import Integers, Reals
from .rows import (
    bounded_decay_row,
    decay_row,
    decode_row,
    encode_row,
    fill_row,
    multiply_row,
    read_number,
    scale_row,
    sigmoid_row,
    sum_of_squares,
)
from .tiles import item_size

__all__ = ["DECAY", "DECAYED_KEY", "KEY", "QUERY", "ROWS", "element", "stage", "write_outputs"]

#: Rows staged per token, and which is which.
ROWS = 4
DECAYED_KEY, DECAY, KEY, QUERY = 0, 1, 2, 3

_EPSILON = 1e-6


@jit
def element(p: Integers, tensor: int, i: int, j: int, k: int) -> int:
    """Address of element ``[i, j, k]`` of a tensor in the block (its further axes at 0)."""
    strides = tensor + at.STRIDES
    offset = i * p[strides] + j * p[strides + 1] + k * p[strides + 2]
    return p[tensor] + offset * item_size(p[tensor + at.CODE])


@inlined
def stage(
    p: Integers, r: Reals, batch: int, token: int, count: int, head: int, v_low: int, v_count: int, base: int
) -> None:
    """Stage ``count`` tokens from row ``token`` of ``batch`` for value head ``head`` and ``v_count`` columns."""
    _stage_gates(p, r, batch, token, count, head, base)
    dim, row = p[at.KEY_DIM], p[at.ROW]
    padded = row // 4
    shared = head // p[at.GROUP]
    span = p[at.VALUE_ROW] // 4
    for i in range(count):
        rows = base + i * ROWS * row
        key, query = rows + KEY * row, rows + QUERY * row
        key_at, query_at = element(p, at.KEY, batch, token + i, shared), element(p, at.Q, batch, token + i, shared)
        decode_row(key, key_at, p[at.KEY + at.STRIDES + 3], dim, p[at.KEY + at.CODE])
        decode_row(query, query_at, p[at.Q + at.STRIDES + 3], dim, p[at.Q + at.CODE])
        factor = r[at.SCALE]
        if p[at.L2NORM]:
            fill_row(key, dim, padded, 0.0)
            fill_row(query, dim, padded, 0.0)
            scale_row(key, padded, 1.0 / math.sqrt(sum_of_squares(key, padded) + _EPSILON))
            factor = factor / math.sqrt(sum_of_squares(query, padded) + _EPSILON)
        scale_row(query, padded, factor)
        multiply_row(rows + DECAYED_KEY * row, rows + DECAY * row, key, padded)
        values = base + p[at.VALUES] + i * p[at.VALUE_ROW]
        values_at = element(p, at.VALUE, batch, token + i, head)
        stride, code = p[at.VALUE + at.STRIDES + 3], p[at.VALUE + at.CODE]
        decode_row(values, values_at + v_low * stride * item_size(code), stride, v_count, code)
        fill_row(values, v_count, span, 0.0)


@inlined
def _stage_gates(p: Integers, r: Reals, batch: int, token: int, count: int, head: int, base: int) -> None:
    gates, bias, betas = base + p[at.GATES], base + p[at.BIAS], base + p[at.BETAS]
    code = p[at.A_LOG + at.CODE]
    decode_row(gates, element(p, at.A_LOG, head, 0, 0), 1, 1, code)
    A_log = read_number(gates)

    decode_row(betas, element(p, at.B, batch, token, head), p[at.B + at.STRIDES + 1], count, p[at.B + at.CODE])
    sigmoid_row(betas, count, r[at.BETA_FACTOR])

    dim, row = p[at.KEY_DIM], p[at.ROW]
    code, bias_code = p[at.A + at.CODE], p[at.DT_BIAS + at.CODE]
    bias_at = element(p, at.DT_BIAS, head, 0, 0)
    if p[at.IS_KDA]:
        decode_row(bias, bias_at, p[at.DT_BIAS + at.STRIDES + 1], dim, bias_code)
        for i in range(count):
            decay = base + (i * ROWS + DECAY) * row
            decode_row(decay, element(p, at.A, batch, token + i, head), p[at.A + at.STRIDES + 3], dim, code)
            _decays(p, r, decay, bias, dim, A_log)
        return
    # One gate per token: the chunk's gates are one row, spread over K afterwards.
    decode_row(bias, bias_at, 1, 1, bias_code)
    fill_row(bias, 1, count, read_number(bias))
    decode_row(gates, element(p, at.A, batch, token, head), p[at.A + at.STRIDES + 1], count, code)
    _decays(p, r, gates, bias, count, A_log)
    for i in range(count):
        fill_row(base + (i * ROWS + DECAY) * row, 0, row // 4, read_number(gates + 4 * i))


@jit
def _decays(p: Integers, r: Reals, row: int, bias: int, count: int, A_log: float) -> None:
    if p[at.BOUNDED]:
        bounded_decay_row(row, bias, count, A_log, r[at.LOWER_BOUND])
    else:
        decay_row(row, bias, count, A_log, r[at.SOFTPLUS_BETA], r[at.SOFTPLUS_THRESHOLD])


@inlined
def write_outputs(
    p: Integers, batch: int, token: int, count: int, head: int, v_low: int, v_count: int, base: int
) -> None:
    """Round the rows of values, which hold outputs by now, to the output's dtype."""
    stride, code = p[at.OUT + at.STRIDES + 3], p[at.OUT + at.CODE]
    for i in range(count):
        target = element(p, at.OUT, batch, token + i, head) + v_low * stride * item_size(code)
        encode_row(target, stride, base + p[at.VALUES] + i * p[at.VALUE_ROW], v_count, code)
