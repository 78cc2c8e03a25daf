"""Schemas of the op's torch operators, and which one a call takes.

``isokern::fused_sigmoid_gating_step``        updates the pool in place, returns the output; decode and prompt steps
``isokern::fused_sigmoid_gating``             updates the pool and the intermediate states in place, returns the output
``isokern::fused_sigmoid_gating.out``         the same, into ``out``; returns nothing
``isokern::fused_sigmoid_gating_read_only``   writes to no argument; differentiable
``isokern::fused_sigmoid_gating_backward``    gradients of the former
"""

from __future__ import annotations

__all__ = ["BACKWARD", "IN_PLACE", "OUT", "READ_ONLY", "STEP"]

_TENSORS = (
    "Tensor A_log, Tensor a, Tensor dt_bias, float softplus_beta, float softplus_threshold, Tensor q, Tensor k, "
    "Tensor v, Tensor b"
)
_FLAGS = "float? scale=None, bool use_qk_l2norm_in_kernel=False, Tensor? cu_seqlens=None"
_WORDS = 'str state_layout="kv", bool is_kda=False, float? lower_bound=None, bool allow_neg_eigval=False'
_VERIFY = (
    "Tensor? intermediate_state_indices=None, Tensor? retrieve_parent_token=None, Tensor? output_state_indices=None"
)
_CHOICE = "SymInt? max_seqlen=None, str? backend=None"

# The writing operators have no keyword-only arguments but ``out``: each one given costs half a
# microsecond more than in its place.
_WRITING = (
    f"({_TENSORS}, Tensor(a!)? initial_state_source=None, Tensor? initial_state_indices=None, {_FLAGS}, {_WORDS}, "
    f"bool disable_state_update=False, Tensor(b!)? intermediate_states_buffer=None, {_VERIFY}, {_CHOICE}{{out}})"
)
_READING = f"Tensor? initial_state_source=None, Tensor? initial_state_indices=None, {_FLAGS}, *, {_WORDS}, {_CHOICE}"

# Numbers, flags and names are one argument, ``torch_settings``: apart they cost as much as eleven tensors do.
STEP = (
    "fused_sigmoid_gating_step(Tensor A_log, Tensor a, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor b, "
    "Tensor(a!) pool, Tensor slots, Tensor? cu_seqlens, str settings) -> Tensor"
)
IN_PLACE = f"fused_sigmoid_gating{_WRITING.format(out='')} -> Tensor"
OUT = f"fused_sigmoid_gating.out{_WRITING.format(out=', *, Tensor(c!) out')} -> ()"
READ_ONLY = f"fused_sigmoid_gating_read_only({_TENSORS}, {_READING}) -> Tensor"
BACKWARD = f"fused_sigmoid_gating_backward(Tensor grad, bool pool_grad, {_TENSORS}, {_READING}) -> Tensor[]"
