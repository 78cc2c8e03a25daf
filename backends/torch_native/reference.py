"""The op token by token in plain torch: the readable version, differentiable, any dtype, any device."""

from __future__ import annotations

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.gates import beta_of, log_decay, normalise

__all__ = ["run_reference"]


def run_reference(call: Call) -> torch.Tensor:
    """Run ``call`` one token of one sequence at a time; returns the output ``[B, T, HV, V]``.

    Every quantity of a token is computed from that token alone, so how sequences are packed changes no bit.
    """
    compute = torch.float64 if call.q.dtype is torch.float64 else torch.float32
    rows = _Rows(call, compute)
    offsets = call.offsets
    read = call.read_slots.tolist() if call.read_slots is not None else [-1] * call.n
    write = call.write_slots.tolist() if call.write_slots is not None else [-1] * call.n
    stored = call.intermediate_rows.tolist() if call.intermediate_rows is not None else [-1] * call.n
    parents = call.parents.tolist() if call.parents is not None else None
    length = call.q.shape[1]
    outputs: dict[int, torch.Tensor] = {}  # of a call with gradients, which has no out
    for n in range(call.n):
        first, last = offsets[n], offsets[n + 1]
        if first == last:
            continue
        start = _load(call, read[n], compute)
        state = start
        for t in range(last - first):
            if parents is not None and t and stored[n] >= 0:
                parent = parents[n][t]
                state = start if parent < 0 else _stored_step(call, stored[n], parent, compute)
            state, o = rows.step(first + t, state)
            if call.out is not None:
                call.out[(first + t) // length, (first + t) % length].copy_(o)
            else:
                outputs[first + t] = o
            if call.intermediates is not None and stored[n] >= 0:
                _orient(call.intermediates[stored[n], t], call).copy_(state)
        # At once: no sequence reads a slot that another writes, and N states need not be held.
        if call.pool is not None and write[n] >= 0:
            _orient(call.pool[write[n]], call).copy_(state.detach())
    return _collect(call, outputs)


def _orient(state: torch.Tensor, call: Call) -> torch.Tensor:
    """A view ``[HV, K, V]`` of one stored state."""
    return state if call.state_layout == "kv" else state.transpose(-1, -2)


def _load(call: Call, slot: int, compute: torch.dtype) -> torch.Tensor:
    if call.pool is None or slot < 0:
        return torch.zeros(call.hv, call.key_dim, call.value_dim, dtype=compute, device=call.q.device)
    return _orient(call.pool[slot], call).to(compute, copy=True)


def _stored_step(call: Call, row: int, step: int, compute: torch.dtype) -> torch.Tensor:
    assert call.intermediates is not None
    return _orient(call.intermediates[row, step], call).to(compute, copy=True)


class _Rows:
    """The recurrence of one token row."""

    def __init__(self, call: Call, compute: torch.dtype) -> None:
        self.call = call
        self.compute = compute
        self.q, self.k, self.v = (t.flatten(0, 1) for t in (call.q, call.k, call.v))
        self.a, self.b = call.a.flatten(0, 1), call.b.flatten(0, 1)
        self.A_log, self.dt_bias = call.A_log.to(compute), call.dt_bias.to(compute)
        self.group = call.hv // call.h

    def step(self, row: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``state [HV, K, V]`` and a token's row number to the next state and the output ``[HV, V]``."""
        call = self.call
        q, k, v, a, b = (t[row].to(self.compute) for t in (self.q, self.k, self.v, self.a, self.b))
        A_log = self.A_log[:, None] if call.is_kda else self.A_log
        g = log_decay(A_log, a + self.dt_bias, call.softplus_beta, call.softplus_threshold, call.lower_bound)
        beta = beta_of(b, call.allow_neg_eigval)
        if call.use_qk_l2norm:
            q, k = normalise(q), normalise(k)
        q = q * call.scale
        q, k = (t.repeat_interleave(self.group, dim=0) for t in (q, k))
        decay = torch.exp(g)
        state = state * (decay[:, :, None] if call.is_kda else decay[:, None, None])
        u = beta[:, None] * (v - (state * k[:, :, None]).sum(1))
        state = state + k[:, :, None] * u[:, None, :]
        return state, (state * q[:, :, None]).sum(1)


def _collect(call: Call, outputs: dict[int, torch.Tensor]) -> torch.Tensor:
    if call.out is not None:
        return call.out
    blank = torch.zeros(call.hv, call.value_dim, dtype=call.q.dtype, device=call.q.device)
    rows = [outputs[r].to(call.q.dtype) if r in outputs else blank for r in range(call.tokens)]
    stacked = torch.stack(rows) if rows else blank[None][:0]
    return stacked.view(*call.q.shape[:2], call.hv, call.value_dim)
