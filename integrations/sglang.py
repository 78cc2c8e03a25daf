"""SGLang's function of this op, by its own name, arguments and state layout.

from isokern.integrations.sglang import fused_sigmoid_gating_delta_rule_update
"""

from __future__ import annotations

import torch

from .. import registry
from ..errors import ArgumentTypeError, ArgumentValueError
from .arguments import refuse
from .checks import ranked, required

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
    required("A_log", A_log)
    required("a", a)
    required("b", b)
    ranked("q", q, "[B, T, H, K]")
    if cache_steps is not None:
        _check_steps(cache_steps, intermediate_states_buffer)
    if retrieve_parent_token is not None:
        required("retrieve_parent_token", retrieve_parent_token)
        retrieve_parent_token = retrieve_parent_token.contiguous()
    batch, length = q.shape[:2]
    if batch > 1:
        a, b = _batched(a, batch, length), _batched(b, batch, length)
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
        retrieve_parent_token=retrieve_parent_token,
    )
    return o


def _check_steps(cache_steps: int, buffer: torch.Tensor | None) -> None:
    """Raise unless a buffer is there that has as many steps."""
    if buffer is None:
        raise ArgumentValueError("cache_steps", "None without intermediate_states_buffer", repr(cache_steps))
    ranked("intermediate_states_buffer", buffer, "[rows, steps, HV, V, K]")
    if isinstance(cache_steps, bool) or not isinstance(cache_steps, int):
        raise ArgumentTypeError("cache_steps", "an int", type(cache_steps).__name__)
    if not 0 <= cache_steps <= buffer.shape[1]:
        raise ArgumentValueError("cache_steps", f"at most the buffer's {buffer.shape[1]} steps", str(cache_steps))


def _batched(gate: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """``[B, T, ...]`` where the gate comes as ``[B * T, ...]``; else as it is, for the op to judge."""
    if gate.dim() != 2 or gate.shape[0] != batch * length:
        return gate
    return gate.unflatten(0, (batch, length))  # type: ignore[no-untyped-call, no-any-return]
