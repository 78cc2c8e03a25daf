"""The operator of decode and prompt steps: a pool updated in place at given slots, and nothing else unusual.

torch converts an operator's arguments one by one, whether they change from call to call or not. This one takes the
tensors, and all the rest as one word (``torch_settings``). Its kernel knows the op's calls by that word: what compares
equal needs no comparing piece by piece, and is not put together as a call of the op.
"""

from __future__ import annotations

import torch
from torch import is_grad_enabled

from ....errors import IsokernError
from ...overrides import NO_OVERRIDES, current_overrides
from .guards import is_current_stream_capturing
from .host_indices import check_host_indices
from .torch_served import NAME, SERVING, any_requires_grad, process_wide, refuse_grad
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
    op = SERVING.get()
    if op is None:
        op = process_wide()
    overrides = current_overrides()
    forced = None if overrides is NO_OVERRIDES else overrides.get(NAME)
    entries = op.entries
    candidates = entries.recent
    for entry in candidates:
        # As in the hot path. The word stands for all that is no tensor; the guard sees what requires grad, and no entry
        # with a word does.
        if (
            settings != entry.word
            or (forced is not entry.forced and forced != entry.forced)
            or (cu_seqlens is not None) is not entry.has_cu
            or not (
                entry.guard(A_log, a, dt_bias, q, k, v, b, pool, slots)
                if cu_seqlens is None
                else entry.guard(A_log, a, dt_bias, q, k, v, b, pool, slots, cu_seqlens)
            )
            or (entry.on_cuda and is_current_stream_capturing() is not entry.capturing)
        ):
            continue
        if entry.on_host:
            check_host_indices(pool, slots, slots, None, None)
        number = entries.hit()
        if entry is not candidates[0]:
            entries.served(entry, number)
        if entry.reshape is not None:
            a, b, dt_bias = entry.reshape(a, b, dt_bias)
        out: torch.Tensor = entry.new_output(v)
        try:
            entry.pinned(
                (A_log, a, dt_bias, q, k, v, b, pool, slots, slots, cu_seqlens, None, None, None, out),
            )
        except IsokernError:
            raise
        except Exception as error:
            raise op.failed(entry, error) from error
        return out

    if is_grad_enabled() and any_requires_grad(A_log, a, dt_bias, q, k, v, b, pool):
        refuse_grad(A_log, a, dt_bias, q, k, v, b, pool)
    beta, threshold, scale, l2norm, layout, kda, lower_bound, neg_eigval, longest, backend = parse_settings(settings)
    made: torch.Tensor = op(
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
