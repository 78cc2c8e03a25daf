"""A call from its description alone, of tensors without memory: what a problem's calls will most likely look like."""

from __future__ import annotations

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.dtypes import dtype_of
from ...registry.ops.fused_sigmoid_gating.problem import Problem

__all__ = ["sketch"]


def sketch(problem: Problem) -> Call:
    """A call of ``problem`` with contiguous ``meta`` tensors: its head counts, dims and dtypes, a batch of its buckets.

    Exact for what no batch changes; scalars are the op's defaults.
    """
    p = problem
    n, longest = max(1, p.profile.n), max(1, p.profile.longest or 1)
    batch, length = (1, max(n, p.profile.tokens)) if p.varlen else (n, max(1, p.profile.tokens // n))
    state = (p.hv, p.k, p.v) if p.state_layout == "kv" else (p.hv, p.v, p.k)
    gate = (p.hv, p.k) if p.is_kda else (p.hv,)

    def made(dtype: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype_of(dtype), device="meta")

    def slots(dtype: str | None) -> torch.Tensor | None:
        return None if dtype is None else made(dtype, n)

    read = slots(p.index_dtype)
    write = None if p.update in ("none", "disabled") else slots(p.index_dtype) if p.update == "separate" else read
    return Call(
        A_log=made(p.A_log_dtype, p.hv),
        a=made(p.a_dtype, batch, length, *gate),
        dt_bias=made(p.dt_bias_dtype, *gate),
        softplus_beta=1.0,
        softplus_threshold=20.0,
        q=made(p.io_dtype, batch, length, p.h, p.k),
        k=made(p.io_dtype, batch, length, p.h, p.k),
        v=made(p.io_dtype, batch, length, p.hv, p.v),
        b=made(p.b_dtype, batch, length, p.hv),
        scale=p.k**-0.5,
        use_qk_l2norm=p.l2norm,
        pool=None if p.state_dtype is None else made(p.state_dtype, n + 1, *state),
        read_slots=read,
        write_slots=write,
        state_layout=p.state_layout,
        cu_seqlens=None if p.cu_dtype is None else made(p.cu_dtype, n + 1),
        layout=None,
        max_seqlen=None,
        is_kda=p.is_kda,
        lower_bound=-5.0 if p.lower_bound else None,
        allow_neg_eigval=p.neg_eigval,
        intermediates=None if p.intermediate_dtype is None else made(p.intermediate_dtype, n, longest, *state),
        intermediate_rows=slots(p.row_dtype),
        parents=None if p.parent_dtype is None else made(p.parent_dtype, n, longest),
        out=made(p.io_dtype, batch, length, p.hv, p.v),
    )
