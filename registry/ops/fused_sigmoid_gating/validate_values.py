"""``validate="full"``: the checks that read device memory (and so wait for it)."""

from __future__ import annotations

from itertools import pairwise

import torch

from ....errors import ArgumentValueError
from ...varlen.layout import check_offsets
from .call import Call
from .memory import share_memory

__all__ = ["check_values"]

#: Fields of a Call whose argument has another name.
_PUBLIC_NAMES = {
    "pool": "initial_state_source",
    "read_slots": "initial_state_indices",
    "write_slots": "output_state_indices",
    "intermediates": "intermediate_states_buffer",
    "intermediate_rows": "intermediate_state_indices",
    "parents": "retrieve_parent_token",
}


def check_values(call: Call) -> None:
    """Check the values of offsets, slots, rows and parents. Synchronises with the device.

    Raises:
        ArgumentValueError: offsets that do not start at 0, decrease or run past T; a length above
            ``max_seqlen``; a slot or row beyond its pool; two sequences writing one slot or row, or one
            reading a slot another writes; a parent that is not an earlier step; a written tensor that shares
            memory with another argument.
    """
    offsets = call.offsets if call.lengths_on_host else _as_ints(call.cu_seqlens)
    check_offsets(offsets)
    if call.cu_seqlens is not None and offsets[-1] > call.q.shape[1]:
        raise ArgumentValueError("cu_seqlens", f"offsets up to T = {call.q.shape[1]}", f"last offset {offsets[-1]}")
    lengths = [y - x for x, y in pairwise(offsets)]
    longest = max(lengths, default=0)
    if call.layout is not None and call.cu_seqlens is not None:
        on_device = _as_ints(call.cu_seqlens)
        if on_device != call.layout.offsets:
            raise ArgumentValueError("cu_seqlens", "the offsets its SequenceLayout was built from", "changed ones")
    if call.max_seqlen is not None and longest > call.max_seqlen:
        raise ArgumentValueError("max_seqlen", f"at least the longest length {longest}", str(call.max_seqlen))
    if call.pool is not None and call.read_slots is not None:
        _check_slots(call, call.pool.shape[0])
    if call.intermediates is not None and call.intermediate_rows is not None:
        rows = _as_ints(call.intermediate_rows)
        _in_range("intermediate_state_indices", rows, call.intermediates.shape[0], "rows of the buffer")
        _no_duplicates("intermediate_state_indices", rows)
        if longest > call.intermediates.shape[1]:
            raise ArgumentValueError(
                "intermediate_states_buffer",
                f"at least {longest} steps",
                f"{call.intermediates.shape[1]} steps",
            )
    if call.parents is not None:
        _check_parents(call.parents, lengths)
    _check_sharing(call)


def _check_slots(call: Call, slots: int) -> None:
    assert call.read_slots is not None
    read = _as_ints(call.read_slots)
    _in_range("initial_state_indices", read, slots, "slots of the pool")
    if call.update == "in_place":
        _no_duplicates("initial_state_indices", read)
    elif call.update == "separate":
        assert call.write_slots is not None
        write = _as_ints(call.write_slots)
        _in_range("output_state_indices", write, slots, "slots of the pool")
        _no_duplicates("output_state_indices", write)
        readers: dict[int, list[int]] = {}
        for n, slot in enumerate(read):
            if slot >= 0:
                readers.setdefault(slot, []).append(n)
        for n, slot in enumerate(write):
            others = [m for m in readers.get(slot, []) if m != n] if slot >= 0 else []
            if others:
                raise ArgumentValueError(
                    "output_state_indices",
                    "slots no other sequence reads",
                    f"sequence {n} writes slot {slot}, which sequence {others[0]} reads",
                )


def _check_parents(parents: torch.Tensor, lengths: list[int]) -> None:
    table = parents.tolist()
    for n, length in enumerate(lengths):
        if length > parents.shape[1]:
            raise ArgumentValueError("retrieve_parent_token", f"at least {length} steps", f"{parents.shape[1]} steps")
        for t in range(1, length):
            if table[n][t] >= t:
                raise ArgumentValueError(
                    "retrieve_parent_token", f"an earlier step (or negative) at [{n}, {t}]", str(table[n][t])
                )


def _check_sharing(call: Call) -> None:
    """Nothing a call writes may share memory with another of its tensors."""
    tensors = call.tensors()
    written = ["out", "intermediates"] if call.update in ("none", "disabled") else ["out", "intermediates", "pool"]
    for name in written:
        target = tensors.pop(name, None)
        if target is None:
            continue
        for other, tensor in tensors.items():
            if share_memory(target, tensor):
                given = f"memory shared with {_PUBLIC_NAMES.get(other, other)}"
                raise ArgumentValueError(_PUBLIC_NAMES.get(name, name), "memory of its own", given)


def _as_ints(tensor: torch.Tensor | None) -> tuple[int, ...]:
    assert tensor is not None
    return tuple(int(x) for x in tensor.tolist())


def _in_range(name: str, values: tuple[int, ...], size: int, what: str) -> None:
    for n, value in enumerate(values):
        if value >= size:
            raise ArgumentValueError(name, f"numbers below the {size} {what} (negative: none)", f"[{n}] = {value}")


def _no_duplicates(name: str, values: tuple[int, ...]) -> None:
    first: dict[int, int] = {}
    for n, value in enumerate(values):
        if value >= 0 and value in first:
            raise ArgumentValueError(
                name, "a different slot for each sequence", f"[{first[value]}] and [{n}] both {value}"
            )
        first.setdefault(value, n)
