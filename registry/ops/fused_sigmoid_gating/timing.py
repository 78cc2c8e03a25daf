"""What the tuner must know of the op to time a call: how to keep its states cold, and how little it can move."""

from __future__ import annotations

from itertools import pairwise

import torch

from .call import Call
from .case import CaseSpec
from .describe import describe
from .dtypes import dtype_of

__all__ = ["bytes_moved", "describe", "input_bytes", "rotated_calls", "state_bytes", "with_room"]


def state_bytes(case: CaseSpec) -> int:
    """Bytes of the states that one call of ``case`` names; 0 without a pool."""
    if case.state_dtype is None:
        return 0
    sets = 2 if case.update == "separate" else 1
    return sets * case.n * case.hv * case.k * case.v * dtype_of(case.state_dtype).itemsize


def input_bytes(case: CaseSpec) -> int:
    """Bytes of q, k, v and the output that one call of ``case`` names."""
    return 2 * case.tokens * (case.h * case.k + case.hv * case.v) * dtype_of(case.io_dtype).itemsize


def with_room(case: CaseSpec, copies: int) -> CaseSpec:
    """``case`` with a pool that holds the states of ``copies`` calls."""
    sets = 2 if case.update == "separate" else 1
    return case.but(extra_slots=case.extra_slots + (copies - 1) * sets * case.n)


def rotated_calls(call: Call, copies: int) -> tuple[Call, ...]:
    """``call`` and up to ``copies - 1`` others that differ only in the slots they name, no slot named twice.

    As many as the pool has room for. States stay bounded however often they are run: the decay is at most 1, and
    the same keys and values pull each state towards the same limit. Every call has its host offsets already, where
    the host knows them, as one that came through the op has.
    """
    inherited = {"offsets": call.offsets} if call.lengths_on_host else {}
    separate = call.update == "separate"
    named = [t for t in (call.read_slots, call.write_slots if separate else None) if t is not None]
    if call.pool is None or not named:
        return (call,)
    taken = {int(slot) for t in named for slot in t.tolist()}
    free = [slot for slot in range(call.pool.shape[0]) if slot not in taken]
    per_call = sum(t.shape[0] for t in named)
    calls = [call]
    while per_call and len(calls) < copies and len(free) >= per_call:
        moved = []
        for t in named:
            fresh, free = free[: t.shape[0]], free[t.shape[0] :]
            moved.append(torch.where(t < 0, t, torch.tensor(fresh, dtype=t.dtype, device=t.device)))
        changes = {"read_slots": moved[0], **({"write_slots": moved[1]} if separate else {})}
        other = call.replace(**changes)
        other.__dict__.update(inherited)
        calls.append(other)
    return tuple(calls)


def bytes_moved(call: Call) -> int:
    """The least bytes any implementation reads and writes: each input once, each result once."""
    inputs = (call.q, call.k, call.v, call.a, call.b, call.v)  # v twice: the output has its size
    total = sum(t.numel() * t.element_size() for t in inputs)
    offsets = call.offsets if call.lengths_on_host or call.cu_seqlens is None else call.cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(offsets)]
    if call.pool is not None and call.pool.shape[0]:
        per_slot = call.pool[0].numel() * call.pool.element_size()
        for slots in (call.read_slots, call.write_slots):
            if slots is not None:
                total += per_slot * sum(s >= 0 and n > 0 for s, n in zip(slots.tolist(), lengths, strict=True))
    if call.intermediates is not None and call.intermediate_rows is not None:
        per_step = call.intermediates[0, 0].numel() * call.intermediates.element_size()
        total += per_step * sum(n for r, n in zip(call.intermediate_rows.tolist(), lengths, strict=True) if r >= 0)
    return total
