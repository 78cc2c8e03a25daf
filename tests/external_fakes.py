"""Other libraries' functions with their exact signatures, computed in float64: what adapters are tested against.

A fake refuses what its library refuses and does at padding slots and empty sequences what its library does there, so
that an adapter which leaves such a case to it fails the op's own checks.
"""

import sys
import types
from itertools import pairwise

import torch

from isokern.registry.ops.fused_sigmoid_gating.gates import beta_of, log_decay, normalise


def delta_rule(q, k, v, g, beta, scale, l2norm, states, offsets):
    """``[T, heads, ...]`` tensors and ``states [N, HV, K, V]`` in float64; returns outputs and final states."""
    q, k, v, g, beta, states = (t.double() for t in (q, k, v, g, beta, states))
    if l2norm:
        q, k = normalise(q), normalise(k)
    group = v.shape[1] // q.shape[1]
    q, k = (t.repeat_interleave(group, 1) for t in (q * scale, k))
    decay = torch.exp(g)[..., None] if g.dim() == 3 else torch.exp(g)[..., None, None]
    out, states = torch.zeros_like(v), states.clone()
    for n, (first, last) in enumerate(pairwise(offsets)):
        for t in range(first, last):
            state = states[n] * decay[t]
            u = beta[t][:, None] * (v[t] - (state * k[t][..., None]).sum(1))
            states[n] = (state + k[t][..., None] * u[:, None]).float()  # so that a cut sequence keeps its bits
            out[t] = (states[n] * q[t][..., None]).sum(1)
    return out, states


def fused_gates(A_log, a, dt_bias, b, softplus_beta=1.0, threshold=20.0, lower_bound=None, neg_eigval=False):
    A_log = A_log.double()[:, None] if dt_bias.dim() == 2 else A_log.double()
    g = log_decay(A_log, a.double() + dt_bias.double(), softplus_beta, threshold, lower_bound)
    return g, beta_of(b.double(), neg_eigval)


def transposed(states, v_first):
    return states.transpose(-1, -2) if v_first else states


def fused_recurrent_gated_delta_rule(
    q,
    k,
    v,
    g=None,
    gk=None,
    gv=None,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
):
    assert q.shape[0] == 1
    assert gv is None
    assert allow_neg_eigval <= use_beta_sigmoid_in_kernel
    offsets = cu_seqlens.tolist()
    assert initial_state is None or len(initial_state) == len(offsets) - 1
    if use_gate_in_kernel:
        g, _ = fused_gates(A_log, g, dt_bias, g[..., :1])
    if use_beta_sigmoid_in_kernel:
        beta = beta_of(beta.double(), allow_neg_eigval)
    hv, kd, vd = v.shape[2], k.shape[3], v.shape[3]
    zeros = torch.zeros(len(offsets) - 1, hv, kd, vd)
    start = zeros if initial_state is None else transposed(initial_state, state_v_first)
    decay = (g if gk is None else gk)[0]
    out, states = delta_rule(q[0], k[0], v[0], decay, beta[0], scale, use_qk_l2norm_in_kernel, start, offsets)
    final = transposed(states, state_v_first).float().contiguous() if output_final_state else None
    return out[None].to(v.dtype), final


def by_chunks(offsets, states):
    """What numbering sequences by their chunks makes of a batch: an empty one has none, and all after it slip."""
    assert all(x < y for x, y in pairwise(offsets)), "an empty sequence"
    return states


def fla_chunk(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    cp_context=None,
    *,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    chunk_size=64,
):
    assert chunk_size in (16, 32, 64)
    assert use_gate_in_kernel
    assert use_beta_sigmoid_in_kernel, "FlashQLA would be given the call"
    assert cu_seqlens.dtype is torch.int64
    assert not cu_seqlens_cpu.is_cuda
    by_chunks(cu_seqlens_cpu.tolist(), initial_state)
    return fused_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def flashqla_chunk(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    head_first=False,
    state_v_first=False,
    auto_cp=True,
    enable_fwd_cp_cache=True,
    cp_context=None,
    force_intra_cp=False,
):
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert k.shape[3] == v.shape[3] == 128
    assert g.dtype is beta.dtype is initial_state.dtype is torch.float32
    assert not enable_fwd_cp_cache
    by_chunks(cu_seqlens.tolist(), initial_state)
    return fused_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def pool_states(pool, slots):
    """``[N, HV, K, V]`` in float64 out of a vk pool; zeros for a negative slot."""
    states = pool[slots.clamp(min=0).long()].transpose(-1, -2).double()
    states[slots < 0] = 0
    return states


def sglang_triton(
    A_log,
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
    scale=None,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    is_kda=False,
    lower_bound=None,
    disable_state_update=False,
    intermediate_states_buffer=None,
    intermediate_state_indices=None,
    cache_steps=None,
    retrieve_parent_token=None,
):
    """Keeps its states in float64 between tokens; otherwise all of the kernel, negative slots included."""
    assert retrieve_parent_token is None
    assert scale > 0
    x = a.double() + dt_bias.double().view(a.shape[2:])
    beyond = softplus_beta * x > softplus_threshold
    A = A_log.double()[:, None] if is_kda else A_log.double()
    g = torch.where(beyond, -A.exp() * x, fused_gates(A_log, a, dt_bias, b, softplus_beta, 1e30, lower_bound)[0])
    if lower_bound is not None:
        g = lower_bound * torch.sigmoid(A.exp() * x)
    beta = torch.sigmoid(b.double())
    offsets = cu_seqlens.tolist()
    pool, slots, n = initial_state_source, initial_state_indices, len(offsets) - 1
    zeros = torch.zeros(n, v.shape[2], k.shape[3], v.shape[3], dtype=torch.float64)
    states = zeros if pool is None else pool_states(pool, slots)
    out = torch.full(v.shape, torch.nan, dtype=torch.float64)
    for i in range(n):
        for t in range(offsets[i], offsets[i + 1]):
            args = (x[0, t : t + 1] for x in (q, k, v, g, beta))
            o, state = delta_rule(*args, scale, use_qk_l2norm_in_kernel, states[i : i + 1], [0, 1])
            out[0, t], states[i] = o[0], state[0]
            row = -1 if intermediate_states_buffer is None else int(intermediate_state_indices[i])
            if row >= 0:
                intermediate_states_buffer[row, t - offsets[i]] = states[i].transpose(-1, -2)
        if pool is not None and not disable_state_update and slots[i] >= 0:
            pool[int(slots[i])] = states[i].transpose(-1, -2).to(pool.dtype)
    return out.to(q.dtype)


def sglang_cutedsl(
    A_log,
    dt_bias,
    q,
    k,
    v,
    a,
    b,
    initial_state_source,
    initial_state_indices,
    cu_seqlens=None,
    scale=None,
    use_qk_l2norm_in_kernel=True,
    softplus_beta=1.0,
    softplus_threshold=20.0,
):
    """One token per slot; a slot of -1 is skipped, its output left as it was allocated."""
    n = len(initial_state_indices)
    assert q.shape[:2] == (1, n)
    assert q.dtype is k.dtype is v.dtype is a.dtype is b.dtype is dt_bias.dtype is torch.bfloat16
    assert A_log.dtype is initial_state_source.dtype is torch.float32
    assert initial_state_indices.dtype is torch.int32
    g, beta = fused_gates(A_log, a, dt_bias, b)
    start = pool_states(initial_state_source, initial_state_indices)
    out, states = delta_rule(q[0], k[0], v[0], g[0], beta[0], k.shape[3] ** -0.5, True, start, list(range(n + 1)))
    held = initial_state_indices >= 0
    initial_state_source[initial_state_indices[held].long()] = states[held].transpose(-1, -2).float()
    out[~held] = torch.nan
    return out[None].to(torch.bfloat16) if n > 1 else out[:, None].to(torch.bfloat16)


def sglang_chunk(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    initial_state_indices=None,
    cu_seqlens=None,
    head_first=False,
    use_qk_l2norm_in_kernel=False,
    inplace_update=True,
):
    assert q.dtype is not torch.float32
    assert beta.dim() == 3
    assert not head_first
    assert initial_state.is_contiguous(), "the copy would be updated"
    offsets = by_chunks(cu_seqlens.tolist(), None) or cu_seqlens.tolist()
    start = pool_states(initial_state, initial_state_indices)
    out, states = delta_rule(q[0], k[0], v[0], g[0], beta[0], scale, use_qk_l2norm_in_kernel, start, offsets)
    if inplace_update:
        held = initial_state_indices >= 0
        slots = initial_state_indices[held].long()
        initial_state[slots] = states[held].transpose(-1, -2).to(initial_state.dtype)
    return out[None].to(q.dtype), None, None


def flashinfer_steps(
    q,
    k,
    v,
    state,
    A_log,
    a,
    dt_bias,
    b,
    scale=None,
    output=None,
    use_qk_l2norm=True,
    initial_state=None,
    initial_state_indices=None,
    output_state_indices=None,
    intermediate_states_buffer=None,
    disable_state_update=False,
    backend="auto",
):
    """``[B, T, ...]``; a slot of -1 gives zeros from a float32 pool, and takes slot 0 of a bfloat16 one."""
    assert state is None
    assert output is None
    n, t = q.shape[:2]
    assert q.dtype is a.dtype is b.dtype is torch.bfloat16
    assert A_log.dtype is torch.float32
    assert k.shape[3] == v.shape[3] == 128
    assert initial_state.dtype in (torch.float32, torch.bfloat16)
    slots = initial_state_indices.long()
    if initial_state.dtype is torch.bfloat16:
        slots = slots.clamp(min=0)
    g, beta = fused_gates(A_log, a, dt_bias, b)
    flat = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    start = pool_states(initial_state, slots)
    out, states = delta_rule(*flat, scale, use_qk_l2norm, start, list(range(0, n * t + 1, t)))
    held = slots >= 0
    initial_state[slots[held]] = states[held].transpose(-1, -2).to(initial_state.dtype)
    out = out.view(n, t, *out.shape[1:])
    out[~held] = 0
    return out.to(torch.bfloat16), initial_state


def flashinfer_prefill(
    q,
    k,
    v,
    g=None,
    beta=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    use_qk_l2norm_in_kernel=False,
    output=None,
    output_state=None,
    state_checkpoints=None,
    checkpoint_cu_starts=None,
    checkpoint_every_n_tokens=0,
    use_cp="auto",
    state_indices=None,
    _cp_chunk_len=None,
    backend="auto",
    max_seqlen=None,
):
    assert g.dtype is beta.dtype is torch.float32
    assert g.is_contiguous()
    assert bool((g >= 0).all()), "g is the decay itself, not its logarithm"
    assert output_final_state
    assert output_state is initial_state
    assert bool((state_indices >= 0).all()), "a slot of -1"
    assert len(state_indices) == len(cu_seqlens) - 1 > 0
    start = pool_states(initial_state, state_indices)
    offsets = cu_seqlens.tolist()
    out, states = delta_rule(
        q, k, v, torch.log(g.double()), beta, scale or k.shape[2] ** -0.5, use_qk_l2norm_in_kernel, start, offsets
    )
    initial_state[state_indices.long()] = states.transpose(-1, -2).to(initial_state.dtype)
    return out.to(q.dtype), output_state


#: Adapter name to its library's module, the function there, and the fake of it.
FAKES = {
    "fla_recurrent": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule", fused_recurrent_gated_delta_rule),
    "fla_chunk": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", fla_chunk),
    "flashqla": ("flash_qla", "chunk_gated_delta_rule", flashqla_chunk),
    "sglang_triton": (
        "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent",
        "fused_sigmoid_gating_delta_rule_update",
        sglang_triton,
    ),
    "sglang_cutedsl": (
        "sglang.kernels.ops.attention.cutedsl_gdn",
        "cutedsl_fused_sigmoid_gating_delta_rule_update",
        sglang_cutedsl,
    ),
    "sglang_chunk": ("sglang.kernels.ops.attention.fla.chunk", "chunk_gated_delta_rule", sglang_chunk),
    "flashinfer_decode": ("flashinfer.gdn_decode", "gated_delta_rule_decode_pretranspose", flashinfer_steps),
    "flashinfer_mtp": ("flashinfer.gdn_decode", "gated_delta_rule_decode_pretranspose", flashinfer_steps),
    "flashinfer_prefill": ("flashinfer.gdn_prefill", "chunk_gated_delta_rule", flashinfer_prefill),
}


def install(monkeypatch, only=None):
    """Put the fakes where the libraries would be imported from; names in ``only`` alone if given."""
    for name, (module, function, fake) in FAKES.items():
        if only is not None and name not in only:
            continue
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        monkeypatch.setattr(sys.modules[module], function, fake, raising=False)
