"""SGLang's function of this op, by its own name, arguments and state layout.

from isokern.integrations.sglang import fused_sigmoid_gating_delta_rule_update
"""

from __future__ import annotations

import torch

from .. import registry
from ..errors import ArgumentValueError
from .arguments import refuse

__all__ = ["fused_sigmoid_gating_delta_rule_update"]


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    is_kda: bool = False,
    lower_bound: float | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    cache_ring: bool = False,
    replayssm_rawv: torch.Tensor | None = None,
    replayssm_rawk: torch.Tensor | None = None,
    replayssm_g: torch.Tensor | None = None,
    replayssm_beta: torch.Tensor | None = None,
    match_cutedsl_decode: bool = False,
) -> torch.Tensor:
    """Decode, prefill or verification with SGLang's state pool. See the op for what is computed.

    Args:
        A_log: ``[HV]``, of any shape with HV values; a, b: as for the op, or flattened to ``[B * T, ...]``.
        initial_state_source: ``[slots, HV, V, K]`` (K innermost), any slot stride; updated in place.
        intermediate_states_buffer: ``[rows, steps, HV, V, K]``; cache_steps: how many of its steps are in use.
        retrieve_parent_token: ``[N, steps]``, any strides (a copy is made of what is not contiguous).
        lower_bound: of KDA gates; GDN gates have none here.
        cache_ring, replayssm_*: the ring of raw inputs is not written: refused.
        match_cutedsl_decode: another kernel's rounding is not reproduced: refused.

    Returns:
        ``[B, T, HV, V]`` in q's dtype. Rows of slots below 0 are computed from a zero state, as in the original.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument; nothing has been written.
    """
    refuse(
        "the ring of raw inputs is not written here",
        cache_ring=cache_ring,
        replayssm_rawv=replayssm_rawv,
        replayssm_rawk=replayssm_rawk,
        replayssm_g=replayssm_g,
        replayssm_beta=replayssm_beta,
    )
    refuse("one kernel's rounding is not reproduced here", match_cutedsl_decode=match_cutedsl_decode)
    if cache_steps is not None:
        steps = 0 if intermediate_states_buffer is None else intermediate_states_buffer.shape[1]
        if not 0 <= cache_steps <= steps:
            raise ArgumentValueError("cache_steps", f"at most the buffer's {steps} steps", str(cache_steps))
    batch, length = q.shape[:2]
    if batch > 1:
        a = a.unflatten(0, (batch, length)) if a.dim() == 2 else a  # type: ignore[no-untyped-call]
        b = b.unflatten(0, (batch, length)) if b.dim() == 2 else b  # type: ignore[no-untyped-call]
    o: torch.Tensor = registry.get("fused_sigmoid_gating")(
        A_log.reshape(-1) if A_log.dim() != 1 else A_log,
        a,
        dt_bias,
        softplus_beta,
        softplus_threshold,
        q,
        k,
        v,
        b,
        initial_state_source,
        initial_state_indices,
        scale,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        state_layout="vk",
        is_kda=is_kda,
        lower_bound=lower_bound,
        disable_state_update=disable_state_update,
        intermediate_states_buffer=intermediate_states_buffer,
        intermediate_state_indices=intermediate_state_indices,
        retrieve_parent_token=None if retrieve_parent_token is None else retrieve_parent_token.contiguous(),
    )
    return o
