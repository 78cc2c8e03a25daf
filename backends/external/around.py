"""What is done around a library's kernel: gates, states out of and into the pool, the output's rows.

On a GPU one Triton launch each and no synchronisation; on a CPU, where the adapters are tested, torch.
"""

from __future__ import annotations

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.gates import beta_of, log_decay

__all__ = ["copy_rows", "gates", "gather_states", "scatter_states", "zero_states"]

_BLOCK = 1024


def gates(call: Call, a: torch.Tensor, b: torch.Tensor, linear: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The call's gates from its packed ``a [1, T, HV]`` (KDA: ``[1, T, HV, K]``) and ``b [1, T, HV]``.

    Returns:
        ``g`` of a's shape, the log of the decay (``linear``: the decay itself), and ``beta`` of b's; float32, dense.
    """
    if not a.is_cuda:
        # In float64: torch's float32 functions round a value by its place in a vector.
        A_log = call.A_log.double()
        x = a.double() + call.dt_bias.double()
        scale = A_log[:, None] if call.is_kda else A_log
        g = log_decay(scale, x, call.softplus_beta, call.softplus_threshold, call.lower_bound)
        beta = beta_of(b.double(), call.allow_neg_eigval)
        return (torch.exp(g) if linear else g).float(), beta.float()
    return _launch_gates(call, a, b, linear)


def _launch_gates(call: Call, a: torch.Tensor, b: torch.Tensor, linear: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from .kernels import gates_kernel

    g = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    beta = torch.empty(b.shape, dtype=torch.float32, device=b.device)
    inner = a.shape[-1] if call.is_kda else 1
    gates_kernel[(-(-g.numel() // _BLOCK),)](
        a,
        b,
        call.A_log,
        call.dt_bias,
        g,
        beta,
        g.numel(),
        float(call.softplus_beta),
        float(call.softplus_threshold),
        0.0 if call.lower_bound is None else float(call.lower_bound),
        a.stride(1),
        a.stride(2),
        a.stride(3) if call.is_kda else 0,
        b.stride(1),
        b.stride(2),
        call.A_log.stride(0),
        call.dt_bias.stride(0),
        call.dt_bias.stride(1) if call.is_kda else 0,
        HV=b.shape[2],
        INNER=inner,
        BOUNDED=call.lower_bound is not None,
        NEG_EIGVAL=call.allow_neg_eigval,
        LINEAR=linear,
        BLOCK=_BLOCK,
        enable_fp_fusion=False,
    )
    return g, beta


def gather_states(pool: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``[N, ...]``: the states of ``slots``, zeros for a slot below 0; in ``dtype`` (default: the pool's)."""
    kind = pool.dtype if dtype is None else dtype
    if not pool.is_cuda:
        states = pool.index_select(0, slots.clamp(min=0)).to(kind)
        return states.masked_fill((slots < 0).view(-1, 1, 1, 1), 0)
    states = torch.empty((slots.shape[0], *pool.shape[1:]), dtype=kind, device=pool.device)
    _copy_states(pool, states, slots, None, gather=True)
    return states


def scatter_states(
    states: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> None:
    """``states [N, ...]`` into the pool, but for slots below 0 and, by ``cu_seqlens [N + 1]``, empty sequences."""
    if pool.is_cuda:
        _copy_states(pool, states.contiguous(), slots, cu_seqlens, gather=False)
        return
    held = slots >= 0
    if cu_seqlens is not None:
        held = held & (cu_seqlens[1:] > cu_seqlens[:-1])
    pool[slots[held].long()] = states[held].to(pool.dtype)


def _copy_states(
    pool: torch.Tensor, states: torch.Tensor, slots: torch.Tensor, cu_seqlens: torch.Tensor | None, gather: bool
) -> None:
    from .kernels import copy_states_kernel

    n, hv, rows, cols = states.shape
    copy_states_kernel[(n * hv, -(-rows * cols // (4 * _BLOCK)))](
        pool,
        states,
        slots,
        cu_seqlens,
        *pool.stride(),
        HV=hv,
        ROWS=rows,
        COLS=cols,
        GATHER=gather,
        LENGTHS=cu_seqlens is not None,
        BLOCK=4 * _BLOCK,
    )


def zero_states(call: Call, n: int, v_first: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[n, HV, V, K]`` (``v_first``) or ``[n, HV, K, V]`` zeros."""
    inner = (call.value_dim, call.key_dim) if v_first else (call.key_dim, call.value_dim)
    return torch.zeros(n, call.hv, *inner, dtype=dtype, device=call.q.device)


def copy_rows(source: torch.Tensor, out: torch.Tensor, end: torch.Tensor) -> None:
    """Rows ``t < end`` of ``source [T, HV, V]`` to ``out``, any strides; ``end [1]`` is read on the device."""
    if not out.is_cuda:
        covered = int(end)
        out[:covered].copy_(source[:covered])
    else:
        _copy_rows(source, out, end)


def _copy_rows(source: torch.Tensor, out: torch.Tensor, end: torch.Tensor) -> None:
    from .kernels import copy_rows_kernel

    tokens, hv, v = source.shape
    copy_rows_kernel[(tokens, -(-hv * v // _BLOCK))](
        source, out, end, *source.stride(), *out.stride(), HV=hv, V=v, BLOCK=_BLOCK
    )
