"""Triton kernels around a library's own: gates, gathered and scattered states, rows of the output. One launch each.

Torch's operators would need several launches, and cannot leave out a slot of -1 without asking the host.
"""

# The body of a Triton function is Triton's language: types are inferred.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.gates import LARGEST, TINY, _log1p_of_exp, _sigmoid

__all__ = ["copy_rows_kernel", "copy_states_kernel", "gates_kernel"]


@triton.jit
def gates_kernel(
    a,
    b,
    A_log,
    dt_bias,
    g,
    beta,
    count,
    softplus_beta,
    softplus_threshold,
    lower_bound,
    sa_t,
    sa_h,
    sa_k,
    sb_t,
    sb_h,
    s_A,
    sd_h,
    sd_k,
    HV: tl.constexpr,
    INNER: tl.constexpr,
    BOUNDED: tl.constexpr,
    NEG_EIGVAL: tl.constexpr,
    LINEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``g [T, HV, INNER]`` (``exp(g)`` if LINEAR) and ``beta [T, HV]``, float32, dense; ``count`` = T * HV * INNER."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row, inner = at // INNER, at % INNER
    t, h = row // HV, row % HV
    x = tl.load(a + t * sa_t + h * sa_h + inner * sa_k, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(dt_bias + h * sd_h + inner * sd_k, mask=inside, other=0.0).to(tl.float32)
    log_scale = tl.load(A_log + h * s_A, mask=inside, other=0.0).to(tl.float32)
    scale = tl.minimum(tl.exp(log_scale), LARGEST)
    if BOUNDED:
        decay = lower_bound * _sigmoid(scale * x)
    else:
        z = softplus_beta * x
        softplus = tl.maximum(z, 0.0) + _log1p_of_exp(-tl.abs(z))
        softplus = tl.where(z > softplus_threshold, z, softplus)
        decay = -tl.where(z < TINY, tl.exp(log_scale + z), scale * softplus) / softplus_beta
    if LINEAR:
        decay = tl.exp(decay)
    tl.store(g + at, decay, mask=inside)
    first = inside & (inner == 0)
    share = _sigmoid(tl.load(b + t * sb_t + h * sb_h, mask=first, other=0.0).to(tl.float32))
    if NEG_EIGVAL:
        share = 2.0 * share
    tl.store(beta + row, share, mask=first)


@triton.jit
def copy_states_kernel(
    pool,
    states,
    slots,
    cu_seqlens,
    s_slot,
    s_head,
    s_row,
    s_col,
    HV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GATHER: tl.constexpr,
    LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Between ``pool`` and dense ``states [N, HV, ROWS, COLS]``: a program per (state, head) and BLOCK of its values.

    GATHER: a slot below 0 gives zeros. Else to the pool, but for slots below 0 and, with LENGTHS, empty sequences.
    """
    pid = tl.program_id(0).to(tl.int64)
    n, h = pid // HV, pid % HV
    slot = tl.load(slots + n).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < ROWS * COLS
    held = inside & (slot >= 0)
    place = pool + slot * s_slot + h * s_head + (at // COLS).to(tl.int64) * s_row + (at % COLS).to(tl.int64) * s_col
    dense = states + pid * (ROWS * COLS) + at
    if GATHER:
        tl.store(dense, tl.load(place, mask=held, other=0.0).to(states.dtype.element_ty), mask=inside)
    else:
        if LENGTHS:
            held = held & (tl.load(cu_seqlens + n + 1) > tl.load(cu_seqlens + n))
        tl.store(place, tl.load(dense, mask=held, other=0.0).to(pool.dtype.element_ty), mask=held)


@triton.jit
def copy_rows_kernel(
    source,
    out,
    end,
    s_t,
    s_h,
    s_v,
    o_t,
    o_h,
    o_v,
    HV: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows ``t < end[0]`` of ``source [T, HV, V]`` to ``out``: a program per row and BLOCK of its values."""
    t = tl.program_id(0).to(tl.int64)
    if t < tl.load(end).to(tl.int64):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < HV * V
        h, v = (at // V).to(tl.int64), (at % V).to(tl.int64)
        values = tl.load(source + t * s_t + h * s_h + v * s_v, mask=inside, other=0.0)
        tl.store(out + t * o_t + h * o_h + v * o_v, values.to(out.dtype.element_ty), mask=inside)
