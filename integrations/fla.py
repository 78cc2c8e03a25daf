"""flash-linear-attention's functions of this op, by their own names and arguments: gated delta rule and KDA.

    from isokern.integrations.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

They take the decay g and beta as numbers where the op computes both; see :mod:`.gates` for what undoing that costs, and
hand gates over raw (``use_gate_in_kernel``, ``use_beta_sigmoid_in_kernel``) where they are. Which kernel runs is the
registry's choice: the recurrent and the chunked function differ in their arguments alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import registry
from ..errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from ..registry.varlen.layout import SequenceLayout
from ..registry.varlen.offsets import check_offsets_tensor
from .arguments import refuse, refuse_unknown, rethrow
from .checks import gradients_wanted, ranked, required, sequences, shaped
from .gates import raw_beta, raw_decay
from .slots import slots

__all__ = ["chunk_gated_delta_rule", "chunk_kda", "fused_recurrent_gated_delta_rule", "fused_recurrent_kda"]

Result = tuple[torch.Tensor, torch.Tensor | None]

#: The op's names of arguments that have others here.
_NAMES = {
    "b": "beta",
    "initial_state_source": "initial_state",
    "query_start_loc": "cu_seqlens",
    "query_start_loc_cpu": "cu_seqlens_cpu",
}
_RAW_ONLY = "it belongs to raw gates: use_gate_in_kernel=True"
_CHOSEN = "how a kernel runs is the registry's choice; it does not change the result"
_PARALLEL = "context parallelism is not served"


@dataclass(frozen=True, slots=True)
class _Gates:
    """The op's gate arguments; name: what the caller calls ``a``."""

    A_log: torch.Tensor
    a: torch.Tensor
    dt_bias: torch.Tensor
    b: torch.Tensor
    is_kda: bool
    allow_neg_eigval: bool
    lower_bound: float | None = None
    name: str = "g"


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """The gated delta rule; differentiable, unlike the original.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; g, beta: ``[B, T, HV]``, None for 0 and 1 (g is required raw);
        beta per value channel, ``[B, T, HV, V]``: not served;
        gk: ``[B, T, HV, K]``, decays per key channel, multiplied with g's; gv: not served.
        initial_state: ``[N, HV, K, V]`` (``V, K`` with state_v_first), never written.

    Returns:
        o ``[B, T, HV, V]``, and the final state in float32 or None. See :func:`chunk_gated_delta_rule`.
    """
    state_v_first = _state_v_first(state_v_first, kwargs)
    refuse_unknown("fused_recurrent_gated_delta_rule", kwargs)
    refuse("decays per value channel are not served", gv=gv)
    if use_gate_in_kernel:
        refuse("raw gates are per head", gk=gk)
        if g is None:
            raise ArgumentTypeError("g", "a tensor with use_gate_in_kernel=True", "None")
    ranked("q", q, "[B, T, H, K]")
    ranked("v", v, "[B, T, HV, V]")
    if g is not None and gk is not None:
        shaped("g", g, "[B, T, HV]", v.shape[:3])
        shaped("gk", gk, "[B, T, HV, K]", (*v.shape[:3], q.shape[3]))
        decay = gk + g.unsqueeze(-1)
    elif gk is not None:
        decay = gk
    elif g is not None:
        decay = g
    else:
        decay = q.new_zeros(*v.shape[:3], dtype=torch.float32)
    if beta is None:
        if use_beta_sigmoid_in_kernel:
            raise ArgumentTypeError("beta", "a tensor with use_beta_sigmoid_in_kernel=True", "None")
        beta = q.new_ones(*v.shape[:3], dtype=torch.float32)
    gates = _gates(
        q, v, decay, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        is_kda=gk is not None, name="g" if gk is None else "gk",
    )  # fmt: skip
    return _run(
        q, k, v, gates, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens
    )


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> Result:
    """The gated delta rule; differentiable in every float input.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; g, beta: ``[B, T, HV]``.
        initial_state: ``[N, HV, K, V]`` (``V, K`` with state_v_first), never written.
        cu_seqlens_cpu: cu_seqlens on the host; saves backends that must know the lengths from waiting for the device.
        use_gate_in_kernel, A_log, dt_bias (by keyword): g is raw, ``-exp(A_log) * softplus(g + dt_bias)``.
        chunk_indices, cp_context, chunk_size, and any other keyword: refused.

    Returns:
        o ``[B, T, HV, V]`` in q's dtype, and the final state ``[N, HV, K, V]`` in float32, or None unless asked for.

    Raises:
        ArgumentValueError, ArgumentTypeError: naming the argument; also for a final state where gradients are wanted.
    """
    state_v_first = _state_v_first(state_v_first, kwargs)
    raw, A_log, dt_bias = _raw_gate_arguments(kwargs)
    refuse(_CHOSEN, chunk_size=kwargs.pop("chunk_size", None), chunk_indices=chunk_indices)
    refuse(_PARALLEL, cp_context=cp_context)
    refuse_unknown("chunk_gated_delta_rule", kwargs)
    gates = _gates(q, v, g, beta, raw, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, is_kda=False)
    return _run(
        q, k, v, gates, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
        cu_seqlens_cpu,
    )  # fmt: skip


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """KDA, decays per key channel: g ``[B, T, HV, K]``, dt_bias ``[HV * K]``; else as the gated delta rule."""
    state_v_first = _state_v_first(state_v_first, kwargs)
    refuse_unknown("fused_recurrent_kda", kwargs)
    gates = _gates(
        q, v, g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        is_kda=True, lower_bound=lower_bound,
    )  # fmt: skip
    return _run(
        q, k, v, gates, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens
    )


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> Result:
    """KDA, differentiable in every float input: g ``[B, T, HV, K]``, ``dt_bias`` (by keyword) ``[HV * K]``.

    safe_gate needs lower_bound with raw gates, as in the original, and nothing otherwise: no result depends on it.
    disable_recompute, return_intermediate_states, use_graph, max_num_seqs, cp_context and unknown keywords: refused.
    """
    state_v_first = _state_v_first(state_v_first, kwargs)
    A_log, dt_bias = kwargs.pop("A_log", None), kwargs.pop("dt_bias", None)
    refuse(
        _CHOSEN,
        chunk_size=kwargs.pop("chunk_size", None),
        disable_recompute=disable_recompute,
        use_graph=use_graph,
        max_num_seqs=max_num_seqs,
    )
    refuse("states inside a sequence are not returned", return_intermediate_states=return_intermediate_states)
    refuse(_PARALLEL, cp_context=cp_context)
    refuse_unknown("chunk_kda", kwargs)
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ArgumentTypeError("lower_bound", "a number with safe_gate and use_gate_in_kernel", "None")
    gates = _gates(
        q, v, g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        is_kda=True, lower_bound=lower_bound,
    )  # fmt: skip
    return _run(
        q, k, v, gates, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens,
        cu_seqlens_cpu,
    )  # fmt: skip


def _state_v_first(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """Honours the argument's former name, as the original does."""
    former = kwargs.pop("transpose_state_layout", None)
    if former is None:
        return state_v_first
    if state_v_first:
        raise ArgumentValueError("transpose_state_layout", "state_v_first or its former name", "both")
    return bool(former)


def _raw_gate_arguments(kwargs: dict[str, Any]) -> tuple[bool, torch.Tensor | None, torch.Tensor | None]:
    return bool(kwargs.pop("use_gate_in_kernel", False)), kwargs.pop("A_log", None), kwargs.pop("dt_bias", None)


def _gates(
    q: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    raw_g: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    raw_b: bool,
    allow_neg_eigval: bool,
    *,
    is_kda: bool,
    lower_bound: float | None = None,
    name: str = "g",
) -> _Gates:
    """Raw where the caller has them raw, undone where not. name: what the caller calls g."""
    ranked("q", q, "[B, T, H, K]")
    ranked("v", v, "[B, T, HV, V]")
    required(name, g)
    required("beta", beta)
    assert g is not None
    assert beta is not None
    if beta.dim() == v.dim():
        expected, given = f"[B, T, HV] = {list(v.shape[:3])}", f"shape {list(beta.shape)}"
        raise ArgumentValueError("beta", expected, given, "betas per value channel are not served")
    if allow_neg_eigval and not raw_b:
        raise ArgumentValueError("allow_neg_eigval", "use_beta_sigmoid_in_kernel=True with it", "False")
    if raw_g:
        if A_log is None and lower_bound is None:
            raise ArgumentTypeError("A_log", "a tensor with use_gate_in_kernel=True", "None")
    else:
        refuse(_RAW_ONLY, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound)
    heads = v.shape[2]
    none = torch.zeros(heads * (q.shape[3] if is_kda else 1), dtype=torch.float32, device=q.device)
    return _Gates(
        A_log=none[:heads] if A_log is None else A_log,
        a=g if raw_g else raw_decay(g),
        dt_bias=none if dt_bias is None else dt_bias,
        b=beta if raw_b else raw_beta(beta),
        is_kda=is_kda,
        allow_neg_eigval=allow_neg_eigval or not raw_b,
        lower_bound=lower_bound,
        name=name,
    )


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: _Gates,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    l2norm: bool,
    state_v_first: bool,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_cpu: torch.Tensor | None = None,
) -> Result:
    """The op, with a pool of N states in batch order where there are states."""
    n = sequences(q, cu_seqlens)
    if cu_seqlens is None:
        refuse("it belongs to cu_seqlens", cu_seqlens_cpu=cu_seqlens_cpu)
    elif cu_seqlens_cpu is not None:
        check_offsets_tensor(cu_seqlens_cpu, "cu_seqlens_cpu")
        if cu_seqlens_cpu.shape != cu_seqlens.shape:
            expected, given = (f"shape {list(t.shape)}" for t in (cu_seqlens, cu_seqlens_cpu))
            raise ArgumentValueError("cu_seqlens_cpu", f"cu_seqlens' {expected}", given)
    grad = gradients_wanted(q, k, v, gates.A_log, gates.a, gates.dt_bias, gates.b, initial_state)
    if grad and output_final_state:
        expected = "False where gradients are wanted (the final state has none)"
        raise ArgumentValueError("output_final_state", expected, "True", "use torch.no_grad()")
    heads, dims = v.shape[2], (q.shape[3], v.shape[3])
    pool = initial_state
    if pool is not None:
        ranked("initial_state", pool, "[N, HV, V, K]" if state_v_first else "[N, HV, K, V]")
        if pool.shape[0] != n:
            raise ArgumentValueError("initial_state", f"{n} states, one per sequence", f"{pool.shape[0]}")
    if output_final_state:
        shape = (n, heads, *(dims[::-1] if state_v_first else dims))
        pool = q.new_zeros(shape, dtype=torch.float32) if pool is None else pool.to(torch.float32, copy=True)
    layout: torch.Tensor | SequenceLayout | None = cu_seqlens
    try:
        if cu_seqlens is not None and (cu_seqlens_cpu is not None or grad):
            # Backends with gradients must know the lengths on the host.
            layout = SequenceLayout.from_query_start_loc(cu_seqlens, query_start_loc_cpu=cu_seqlens_cpu)
        o: torch.Tensor = registry.get("fused_sigmoid_gating")(
            gates.A_log,
            gates.a,
            gates.dt_bias,
            1.0,
            20.0,
            q,
            k,
            v,
            gates.b,
            pool,
            None if pool is None else slots(n, q.device),
            scale,
            l2norm,
            layout,
            state_layout="vk" if state_v_first else "kv",
            is_kda=gates.is_kda,
            lower_bound=gates.lower_bound,
            allow_neg_eigval=gates.allow_neg_eigval,
            disable_state_update=pool is not None and not output_final_state,
        )
    except ArgumentError as error:
        rethrow(error, {**_NAMES, "a": gates.name})
    return o, pool if output_final_state else None
