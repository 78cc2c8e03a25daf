"""FlashInfer's functions of this op, by their own names and arguments: decode on V-major states, and prefill.

from isokern.integrations.flashinfer import chunk_gated_delta_rule, gated_delta_rule_decode_pretranspose
"""

from __future__ import annotations

import torch

from .. import registry
from ..errors import ArgumentTypeError, ArgumentValueError
from .arguments import refuse
from .gates import raw_beta, raw_decay
from .slots import slots

__all__ = ["chunk_gated_delta_rule", "gated_delta_rule_decode_pretranspose"]


def gated_delta_rule_decode_pretranspose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    output: torch.Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    output_state_indices: torch.Tensor | None = None,
    *,
    intermediate_states_buffer: torch.Tensor | None = None,
    disable_state_update: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One or more tokens of B sequences, with ``state`` ``[B, HV, V, K]`` or a pool of such states and B slots.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; a, b: ``[B, T, HV]``; A_log, dt_bias: ``[HV]``; any of the op's
            dtypes and head dimensions, states in float32, bfloat16 or float16, whatever T.
        state: updated in place; or initial_state, ``[slots, HV, V, K]``, with initial_state_indices ``[B]`` and
            output_state_indices ``[B]`` (None: the same). A negative slot is no slot: its output is zero and it is
            neither read nor written (the original's bfloat16 kernel takes slot 0 instead).
        intermediate_states_buffer: ``[B, T, HV, V, K]``: the state after each token.
        output: ``[B, T, HV, V]`` of any float dtype.

    Returns:
        The output, and the state or pool that was given.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument; nothing has been written.
    """
    if (state is None) is (initial_state is None):
        raise ArgumentTypeError("state", "a state or a pool (initial_state)", "neither" if state is None else "both")
    pool, read = (state, None) if initial_state is None else (initial_state, initial_state_indices)
    assert pool is not None
    if initial_state is None:
        refuse("it belongs to initial_state", initial_state_indices=initial_state_indices)
        refuse("it belongs to initial_state", output_state_indices=output_state_indices)
        if pool.shape[0] != q.shape[0]:
            raise ArgumentValueError("state", f"{q.shape[0]} states, one per sequence", str(pool.shape[0]))
    direct = output is not None and output.dtype == q.dtype
    every = slots(q.shape[0], q.device)
    o: torch.Tensor = registry.get("fused_sigmoid_gating")(
        A_log,
        a,
        dt_bias,
        1.0,
        20.0,
        q,
        k,
        v,
        b,
        pool,
        every if initial_state is None else read,
        scale,
        use_qk_l2norm,
        state_layout="vk",
        disable_state_update=disable_state_update,
        intermediate_states_buffer=intermediate_states_buffer,
        intermediate_state_indices=None if intermediate_states_buffer is None else every,
        output_state_indices=output_state_indices,
        out=output if direct else None,
    )
    if read is not None:
        o.masked_fill_((read < 0).view(-1, 1, 1, 1), 0)
    if output is not None and not direct:
        o = output.copy_(o)
    return o, pool


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    output: torch.Tensor | None = None,
    output_state: torch.Tensor | None = None,
    state_checkpoints: torch.Tensor | None = None,
    checkpoint_cu_starts: torch.Tensor | None = None,
    checkpoint_every_n_tokens: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Prefill of packed sequences.

    Args:
        q, k: ``[T, H, K]``; v: ``[T, HV, V]``, HV a multiple of H (fewer value than query heads: refused).
        g: ``[T, HV]``, the decay itself, in [0, 1], not its logarithm; beta: ``[T, HV]``; None: ones.
        scale: None or 0: ``K ** -0.5``. cu_seqlens: ``[N + 1]``, required.
        initial_state: ``[N, HV, V, K]``, never written; output_state: where the final states go.
        use_qk_l2norm_in_kernel: honoured (the original takes it and normalises nothing).
        output: ``[T, HV, V]`` in q's dtype. state_checkpoints and the like: refused.

    Returns:
        The output, or output and final states ``[N, HV, V, K]`` (float32) with output_final_state.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument; nothing has been written.
    """
    refuse(
        "states inside a sequence are not stored",
        state_checkpoints=state_checkpoints,
        checkpoint_cu_starts=checkpoint_cu_starts,
        checkpoint_every_n_tokens=checkpoint_every_n_tokens or None,
    )
    if cu_seqlens is None:
        raise ArgumentTypeError("cu_seqlens", "a tensor", "None")
    if not output_final_state:
        refuse("it belongs to output_final_state=True", output_state=output_state)
    n, (tokens, heads) = cu_seqlens.shape[0] - 1, v.shape[:2]
    shape = (n, heads, v.shape[2], q.shape[2])
    for name, given in (("initial_state", initial_state), ("output_state", output_state)):
        if given is not None and tuple(given.shape) != shape:
            raise ArgumentValueError(name, f"shape [N, HV, V, K] = {list(shape)}", f"shape {list(given.shape)}")
    pool = initial_state
    if output_final_state:
        pool = q.new_empty(shape, dtype=torch.float32) if output_state is None else output_state
        pool.zero_() if initial_state is None else pool.copy_(initial_state)
    ones = q.new_ones(tokens, heads, dtype=torch.float32)
    none = q.new_zeros(heads, dtype=torch.float32)
    o: torch.Tensor = registry.get("fused_sigmoid_gating")(
        none,
        raw_decay(torch.log(ones if g is None else g)).unsqueeze(0),
        none,
        1.0,
        20.0,
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        raw_beta(ones if beta is None else beta).unsqueeze(0),
        pool,
        None if pool is None else slots(n, q.device),
        scale or None,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        state_layout="vk",
        allow_neg_eigval=True,
        disable_state_update=pool is not None and not output_final_state,
        out=None if output is None else output.unsqueeze(0),
    )
    made = o.squeeze(0) if output is None else output
    if not output_final_state:
        return made
    assert pool is not None
    return made, pool
