"""The operator of decode and prompt steps: a pool updated in place at given slots, and nothing else unusual.

torch converts an operator's arguments one by one, whether they change from call to call or not. This one takes the
tensors, and all the rest as one word (``torch_settings``).
"""

from __future__ import annotations

import torch
from torch import is_grad_enabled

from .torch_served import SERVING, any_requires_grad, process_wide_call, refuse_grad
from .torch_settings import parse_settings

__all__ = ["fake_step", "step"]


def step(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    settings: str,
) -> torch.Tensor:
    """The operator's kernel: shapes as the op's ``__call__`` takes them, ``pool`` and ``slots`` being its
    ``initial_state_source`` and ``initial_state_indices``; raises as that does, and for what requires grad.
    """
    if is_grad_enabled() and any_requires_grad(A_log, a, dt_bias, q, k, v, b, pool):
        refuse_grad(A_log, a, dt_bias, q, k, v, b, pool)
    op = SERVING.get()
    call = process_wide_call() if op is None else op.__call__
    beta, threshold, scale, l2norm, layout, kda, lower_bound, neg_eigval, longest, backend = parse_settings(settings)
    made: torch.Tensor = call(
        A_log, a, dt_bias, beta, threshold, q, k, v, b, pool, slots, scale, l2norm, cu_seqlens, state_layout=layout,
        is_kda=kda, lower_bound=lower_bound, allow_neg_eigval=neg_eigval, max_seqlen=longest, backend=backend,
    )  # fmt: skip
    return made


def fake_step(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    settings: str,
) -> torch.Tensor:
    """What tracing sees of it: a packed output, and the same refusals."""
    refuse_grad(A_log, a, dt_bias, q, k, v, b, pool)
    parse_settings(settings)
    return torch.empty(v.shape, dtype=q.dtype, device=q.device)
