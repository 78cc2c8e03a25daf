"""The chunkwise form under autograd: the same chunk step, out of place, all heads and sequences in one block."""

from __future__ import annotations

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from .chunked import ChunkStep
from .precision import full_precision
from .rows import BlockRows, Window
from .sequences import Block, Heads, Sequences
from .states import Slots, gather_states, head_states, store_states

__all__ = ["run_chunked_grad"]


def run_chunked_grad(call: Call, chunk: int) -> torch.Tensor:
    """The output ``[B, T, HV, V]``, differentiable in q, k, v, a, b, A_log, dt_bias and, read only, the pool.

    The pool's update is not part of the graph. The forward pass is in full precision whatever the process allows;
    the backward pass runs later, under the settings then in force.
    """
    sequences = Sequences(call, on_host=True)
    heads = Heads(0, call.hv, 0, call.h)
    block = Block(0, sequences.count, heads)
    if not block.n:
        return call.v * 0.0
    with full_precision(call.q.device):
        step = ChunkStep(call, heads)
        S = _starting_states(call, sequences, block, step.compute)
        rows = BlockRows(sequences, block)
        ended: list[torch.Tensor] = []
        windows: list[Window] = []
        outputs: list[torch.Tensor] = []
        for t in range(0, sequences.longest(block), chunk):
            window = rows.window(t, chunk)
            alive = window.n * heads.count
            ended.insert(0, S[alive:])
            o, S = step(window, S[:alive])
            windows.append(window)
            outputs.append(o.flatten(0, 1))
    if call.pool is not None and call.write_slots is not None:
        slots = Slots.of(call.write_slots, sequences, not call.q.is_cuda)
        assert slots is not None
        final = torch.cat([S, *ended]).detach().view(block.n, heads.keys, heads.group, call.key_dim, call.value_dim)
        store_states(head_states(call.pool, heads, call), slots.part(0, block.n), final)
    return _assemble(call, sequences, windows, torch.cat(outputs))


def _starting_states(call: Call, sequences: Sequences, block: Block, compute: torch.dtype) -> torch.Tensor:
    """``[n * HV, K, V]``."""
    slots = Slots.of(call.read_slots, sequences, not call.q.is_cuda)
    shape = (block.n * call.hv, call.key_dim, call.value_dim)
    if call.pool is None or slots is None or not call.pool.shape[0]:
        return torch.zeros(shape, dtype=compute, device=call.q.device)
    pool = head_states(call.pool, block.heads, call)
    return gather_states(pool, slots.part(0, block.n), compute).reshape(shape)


def _assemble(call: Call, sequences: Sequences, windows: list[Window], outputs: torch.Tensor) -> torch.Tensor:
    """Token order from the windows' rows: ``outputs`` holds each window's ``[n * width, HV, V]``, one after another."""
    total = sum(sequences.lengths)
    place = torch.empty(total, dtype=torch.int64)
    base = 0
    for window in windows:
        for i in range(window.n):
            first = sequences.starts[i] + window.t
            real = min(window.width, sequences.lengths[i] - window.t)
            place[first : first + real] = torch.arange(base + i * window.width, base + i * window.width + real)
        base += window.n * window.width
    rows = outputs.index_select(0, place.to(outputs.device)).to(call.q.dtype)
    padding = rows.new_zeros(call.tokens - total, *rows.shape[1:])
    return torch.cat([rows, padding]).view(*call.q.shape[:2], call.hv, call.value_dim)
