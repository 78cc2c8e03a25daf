"""States for a library that takes them gathered and returns them, or overwrites them."""

from __future__ import annotations

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from .around import gather_states, scatter_states, zero_states
from .batch import Batch

__all__ = ["start_states", "store_states"]


def start_states(call: Call, batch: Batch, dtype: torch.dtype | None = None, v_first: bool = True) -> torch.Tensor:
    """``[n, HV, ...]`` each sequence's starting state in the pool's layout; zeros, ``v_first`` or not, without one."""
    if call.pool is None or batch.read is None:
        return zero_states(call, batch.n, v_first, torch.float32 if dtype is None else dtype)
    return gather_states(call.pool, batch.read, dtype)


def store_states(call: Call, batch: Batch, states: torch.Tensor) -> None:
    """Final states ``[n, HV, ...]`` into the pool, where the call updates it."""
    if call.pool is not None and batch.write is not None:
        scatter_states(states, call.pool, batch.write, batch.cu)
