"""vLLM's function of this op, by its own name and arguments: a state slot per token, and accepted tokens.

from isokern.integrations.vllm import fused_sigmoid_gating_delta_rule_update
"""

from __future__ import annotations

import torch

from .. import registry
from ..errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from .arguments import rethrow
from .checks import gradients_wanted, ranked, required, sequences, slot_numbers
from .slots import scatter, slots

__all__ = ["fused_sigmoid_gating_delta_rule_update"]

#: The op's names of arguments that have others here.
_NAMES = {
    "softplus_beta": "beta",
    "softplus_threshold": "threshold",
    "initial_state_source": "initial_state",
    "initial_state_indices": "ssm_state_indices",
}


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    is_kda: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode or verification where each token's state goes to a slot of its own.

    Args:
        beta, threshold: of softplus. a, b, A_log, dt_bias, q, k, v: as for the op (mind the order).
        initial_state: the pool, ``[slots, HV, V, K]``, any slot stride, updated in place. Required, as is
        ssm_state_indices: ``[N]`` for one token a sequence, or ``[N, steps]``: token t of sequence n leaves its state
            in slot ``[n, t]`` (nothing for a negative one). No sequence may be longer than ``steps``.
        num_accepted_tokens: ``[N]``: sequence n starts from slot ``[n, num_accepted - 1]``; None: from ``[n, 0]``.
        inplace_final_state: True; states in a new tensor are not served.

    Returns:
        o ``[B, T, HV, V]`` in q's dtype, and ``initial_state``. A sequence whose first slot is negative, or whose
        number of accepted tokens is none of 1 to steps, stores nothing; its output, which the original leaves
        unwritten, starts from a zero state.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument; nothing has been written.
    """
    if initial_state is None or ssm_state_indices is None:
        name = "initial_state" if initial_state is None else "ssm_state_indices"
        raise ArgumentTypeError(name, "a tensor", "None")
    if not inplace_final_state:
        raise ArgumentValueError("inplace_final_state", "True", "False", "states go to the slots of their tokens")
    ranked("q", q, "[B, T, H, K]")
    required("initial_state", initial_state)
    required("ssm_state_indices", ssm_state_indices)
    n = sequences(q, cu_seqlens)
    table = ssm_state_indices if ssm_state_indices.dim() == 2 else ssm_state_indices.unsqueeze(-1)
    if table.dim() != 2 or table.shape[0] != n:
        given = f"shape {list(ssm_state_indices.shape)}"
        raise ArgumentValueError("ssm_state_indices", f"[N] or [N, steps] with N = {n}", given)
    steps = table.shape[1]
    slot_numbers("ssm_state_indices", table, (n, steps), q.device)
    if num_accepted_tokens is not None:
        slot_numbers("num_accepted_tokens", num_accepted_tokens, (n,), q.device)
    tokens = max(1, _longest(q, cu_seqlens, n))
    if tokens > steps:
        raise ArgumentValueError(
            "ssm_state_indices", f"a slot for each of {tokens} tokens or more", f"{steps} a sequence"
        )
    first = _first_slots(table, num_accepted_tokens)
    gates = (A_log, a, dt_bias, beta, threshold, q, k, v, b)
    options = {"state_layout": "vk", "is_kda": is_kda, "max_seqlen": min(steps, q.shape[1])}
    op = registry.get("fused_sigmoid_gating")
    buffer: torch.Tensor | None = None
    if steps > 1:  # else each sequence goes from its slot to its slot
        if gradients_wanted(A_log, a, dt_bias, q, k, v, b, initial_state):
            expected = "one slot a sequence where gradients are wanted"
            raise ArgumentValueError("ssm_state_indices", expected, f"{steps} a sequence", "use torch.no_grad()")
        buffer = initial_state.new_empty(n, steps, *initial_state.shape[1:])
        options |= {
            "disable_state_update": True,
            "intermediate_states_buffer": buffer,
            "intermediate_state_indices": slots(n, q.device),
        }
    try:
        o: torch.Tensor = op(*gates, initial_state, first, scale, use_qk_l2norm_in_kernel, cu_seqlens, **options)
    except ArgumentError as error:
        rethrow(error, _NAMES)
    if buffer is not None:
        lengths = q.shape[1] if cu_seqlens is None else cu_seqlens.diff().unsqueeze(-1)
        held = torch.arange(steps, device=table.device) < lengths
        valid = held & (table >= 0) & (first >= 0).unsqueeze(-1)
        scatter(initial_state, buffer.flatten(0, 1), table.flatten(), valid.flatten())
    return o, initial_state


def _longest(q: torch.Tensor, cu_seqlens: torch.Tensor | None, n: int) -> int:
    """Tokens of the longest sequence; of offsets on a device, which nobody waits for, what it has at least."""
    if cu_seqlens is None:
        return q.shape[1]
    if cu_seqlens.is_cuda:
        return -(-q.shape[1] // max(n, 1))
    return int(cu_seqlens.diff().max()) if n else 0


def _first_slots(table: torch.Tensor, accepted: torch.Tensor | None) -> torch.Tensor:
    """``[N]``: the slot each sequence starts from; -1 where the number accepted names none."""
    if accepted is None:
        return table[:, 0].contiguous()
    place = accepted.to(torch.int64).unsqueeze(-1) - 1
    found = table.gather(1, place.clamp(0, table.shape[1] - 1))
    return torch.where((place < 0) | (place >= table.shape[1]), -1, found).squeeze(-1)
