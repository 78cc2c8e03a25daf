"""FlashInfer's functions of this op, by their own names and arguments: decode on V-major states, and prefill.

from isokern.integrations.flashinfer import chunk_gated_delta_rule, gated_delta_rule_decode_pretranspose
"""

from __future__ import annotations

import torch

from .. import registry
from ..errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from .arguments import refuse, refuse_choice, rethrow
from .checks import ranked, required, sequences, shaped, slot_numbers, writable
from .gates import raw_beta, raw_decay
from .prefill_states import States
from .slots import slots

__all__ = ["chunk_gated_delta_rule", "gated_delta_rule_decode_pretranspose"]

#: The op's names of arguments that have others in prefill.
_OF_PREFILL = {
    "a": "g",
    "b": "beta",
    "initial_state_source": "initial_state",
    "initial_state_indices": "state_indices",
    "out": "output",
}
_KERNELS = "it chooses among FlashInfer's kernels; how a kernel runs is the registry's choice here"


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
    intermediate_states_buffer: torch.Tensor | None = None,
    disable_state_update: bool = False,
    backend: str | None = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One or more tokens of B sequences, with ``state`` ``[B, HV, V, K]`` or a pool of such states and B slots.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; a, b: ``[B, T, HV]``; A_log, dt_bias: ``[HV]``; any of the op's
            dtypes and head dimensions, states in float32, bfloat16 or float16, whatever T.
        state: updated in place; or initial_state, ``[slots, HV, V, K]``, with initial_state_indices ``[B]`` and
            output_state_indices ``[B]`` (None: the same). A negative slot to read marks padding: a zero output, and
            nothing is read or written, whatever slot there is to write (the original's bfloat16 kernel takes slot 0
            instead). Of a negative slot to write alone: nothing is stored.
        intermediate_states_buffer: ``[rows, steps, HV, V, K]``, B rows and T steps or more: the state after each token.
        output: ``[B, T, HV, V]`` of any float dtype. backend: "auto" or None.

    Returns:
        The output, and the state or pool that was given.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument; nothing has been written.
    """
    refuse_choice(_KERNELS, backend=backend)
    if (state is None) is (initial_state is None):
        raise ArgumentTypeError("state", "a state or a pool (initial_state)", "neither" if state is None else "both")
    ranked("q", q, "[B, T, H, K]")
    n = q.shape[0]
    every = slots(n, q.device)
    rows, padding = None, None
    if intermediate_states_buffer is not None:
        ranked("intermediate_states_buffer", intermediate_states_buffer, "[rows, steps, HV, V, K]")
        if intermediate_states_buffer.shape[0] < n:
            given = str(intermediate_states_buffer.shape[0])
            raise ArgumentValueError("intermediate_states_buffer", f"at least {n} rows, one per sequence", given)
        rows = every
    if state is not None:
        refuse("it belongs to initial_state", initial_state_indices=initial_state_indices)
        refuse("it belongs to initial_state", output_state_indices=output_state_indices)
        ranked("state", state, "[B, HV, V, K]")
        if state.shape[0] != n:
            raise ArgumentValueError("state", f"{n} states, one per sequence", str(state.shape[0]))
    else:
        slot_numbers("initial_state_indices", initial_state_indices, (n,), q.device)
        assert initial_state_indices is not None
        padding = initial_state_indices < 0
        if output_state_indices is not None:
            slot_numbers("output_state_indices", output_state_indices, (n,), q.device)
            output_state_indices = torch.where(padding, -1, output_state_indices)
        rows = None if rows is None else torch.where(padding, -1, rows)
    direct = False
    if output is not None:
        ranked("v", v, "[B, T, HV, V]")
        shaped("output", output, "v's shape [B, T, HV, V]", v.shape)
        writable("output", output, q.device)
        direct = output.dtype == q.dtype
    pool = initial_state if state is None else state
    try:
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
            every if state is not None else initial_state_indices,
            scale,
            use_qk_l2norm,
            state_layout="vk",
            disable_state_update=disable_state_update,
            intermediate_states_buffer=intermediate_states_buffer,
            intermediate_state_indices=rows,
            output_state_indices=output_state_indices,
            out=output if direct else None,
        )
    except ArgumentError as error:
        names = {"initial_state_source": "initial_state" if state is None else "state"}
        rethrow(error, {**names, "use_qk_l2norm_in_kernel": "use_qk_l2norm", "out": "output"})
    if padding is not None:
        o.masked_fill_(padding.view(-1, 1, 1, 1), 0)
    if output is not None and not direct:
        o = output.copy_(o)
    assert pool is not None
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
    use_cp: str | bool | None = "auto",
    state_indices: torch.Tensor | None = None,
    _cp_chunk_len: int | None = None,
    backend: str | None = "auto",
    max_seqlen: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Prefill of packed sequences.

    Args:
        q, k: ``[T, H, K]``; v: ``[T, HV, V]``, HV a multiple of H (fewer value than query heads: refused).
        g: ``[T, HV]``, the decay itself, in [0, 1], not its logarithm; beta: ``[T, HV]``; None: ones.
        scale: None or 0: ``K ** -0.5``. cu_seqlens: ``[N + 1]``, required.
        initial_state: ``[N, HV, V, K]``; output_state: where the final states go; of any of the op's float dtypes. One
            tensor may be both, and is then updated in place; else initial_state is not written.
        state_indices: ``[N]``, unique: initial_state and output_state are pools, ``[slots, HV, V, K]``, and sequence i
            reads and writes slot ``state_indices[i]``. A negative one: a zero start, and nothing stored.
        use_qk_l2norm_in_kernel: honoured; the normalised q and k are not rounded to their dtype, as the original's are.
        output: ``[T, HV, V]`` in q's dtype. max_seqlen: the longest length, or more. state_checkpoints and the like,
            _cp_chunk_len, and a backend or use_cp other than "auto" or None: refused.

    Returns:
        The output; with output_final_state output and final states: output_state, or ``[N, HV, V, K]`` in float32.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument; nothing has been written.
    """
    refuse(
        "states inside a sequence are not stored",
        state_checkpoints=state_checkpoints,
        checkpoint_cu_starts=checkpoint_cu_starts,
        checkpoint_every_n_tokens=checkpoint_every_n_tokens or None,
    )
    refuse_choice(_KERNELS, use_cp=use_cp, backend=backend)
    refuse(_KERNELS, _cp_chunk_len=_cp_chunk_len)
    required("cu_seqlens", cu_seqlens)
    ranked("q", q, "[T, H, K]")
    ranked("k", k, "[T, H, K]")
    ranked("v", v, "[T, HV, V]")
    n, (tokens, heads) = sequences(q, cu_seqlens), v.shape[:2]
    if q.shape[1] and heads % q.shape[1]:
        raise ArgumentValueError("v", f"HV a multiple of H = {q.shape[1]}", f"HV = {heads}")
    for name, gate in (("g", g), ("beta", beta)):
        if gate is not None:
            shaped(name, gate, "[T, HV]", (q.shape[0], heads))
    if output is not None:
        shaped("output", output, "v's shape [T, HV, V]", v.shape)
    if isinstance(max_seqlen, int) and n and max_seqlen < -(-tokens // n):
        raise ArgumentValueError("max_seqlen", f"at least T / N = {tokens} / {n}", str(max_seqlen))
    states = States.of(
        (n, heads, v.shape[2], q.shape[2]), q.device, initial_state, output_final_state, output_state, state_indices
    )
    ones = q.new_ones(tokens, heads, dtype=torch.float32)
    none = q.new_zeros(heads, dtype=torch.float32)
    try:
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
            states.pool,
            states.slots,
            scale or None,
            use_qk_l2norm_in_kernel,
            cu_seqlens,
            state_layout="vk",
            allow_neg_eigval=True,
            disable_state_update=states.pool is not None and not output_final_state,
            out=None if output is None else output.unsqueeze(0),
            max_seqlen=max_seqlen,
        )
    except ArgumentError as error:
        rethrow(error, _OF_PREFILL)
    made = o.squeeze(0) if output is None else output
    return (made, states.final(output_state, state_indices)) if output_final_state else made
