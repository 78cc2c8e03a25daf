"""Loading and storing the states of a block, in both pool layouts, with the slot numbers on either side.

On a CPU the slot numbers are read on the host and each state is copied once. On a GPU reading them would wait for
the device, so there a negative slot is handled without knowing which ones are negative: its load is masked, and
its store is redirected to a slot that another sequence of the block stores anyway, with that sequence's value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from .sequences import Block, Heads, Sequences

__all__ = ["Slots", "gather_states", "head_states", "load_states", "store_states"]


@dataclass(frozen=True, slots=True)
class Slots:
    """Slot (or buffer row) numbers of all sequences in working order; negative: none.

    ``host`` is None where they are on a device only; ``device`` is None where the host has them.
    """

    host: tuple[int, ...] | None
    device: torch.Tensor | None

    @classmethod
    def of(cls, numbers: torch.Tensor | None, sequences: Sequences, on_host: bool) -> Slots | None:
        if numbers is None:
            return None
        if on_host:
            values = numbers.tolist()
            return cls(tuple(values[n] for n in sequences.order), None)
        return cls(None, sequences.in_order(numbers).to(torch.int64))

    def part(self, first: int, last: int) -> Slots:
        return Slots(
            None if self.host is None else self.host[first:last],
            None if self.device is None else self.device[first:last],
        )


def head_states(states: torch.Tensor, heads: Heads, call: Call) -> torch.Tensor:
    """A view ``[..., keys, group, K, V]`` of the block's heads in a pool or buffer ``[..., HV, K, V]`` (or V, K)."""
    chosen = states.narrow(-3, heads.first, heads.count)
    oriented = chosen if call.state_layout == "kv" else chosen.transpose(-1, -2)
    return torch.unflatten(oriented, -3, (heads.keys, heads.group))


def load_states(pool: torch.Tensor | None, slots: Slots | None, block: Block, into: torch.Tensor) -> None:
    """Fill ``into [n, keys, group, K, V]`` with the block's starting states; zero where there is none."""
    if pool is None or slots is None or not pool.shape[0]:
        into.zero_()
        return
    mine = slots.part(block.first, block.last)
    if mine.host is None:
        into.copy_(gather_states(pool, mine, into.dtype))
        return
    for target, slot in zip(into, mine.host, strict=True):
        if slot >= 0:
            target.copy_(pool[slot])
        else:
            target.zero_()


def gather_states(pool: torch.Tensor, slots: Slots, dtype: torch.dtype) -> torch.Tensor:
    """The states at ``slots`` as a new, differentiable tensor ``[n, keys, group, K, V]``."""
    numbers = slots.device
    if numbers is None:
        numbers = torch.tensor(slots.host, dtype=torch.int64, device=pool.device)
    states = pool.index_select(0, numbers.clamp(min=0)).to(dtype)
    return torch.where((numbers >= 0)[:, None, None, None, None], states, torch.zeros_like(states))


def store_states(pool: torch.Tensor, slots: Slots, states: torch.Tensor, alive: torch.Tensor | None = None) -> None:
    """Store ``states [n, keys, group, K, V]`` at the non-negative ``slots`` of those ``alive [n]`` (None: all)."""
    if not pool.shape[0] or not states.shape[0]:
        return
    if slots.host is not None and alive is None:
        for slot, state in zip(slots.host, states, strict=True):
            if slot >= 0:
                pool[slot].copy_(state)
        return
    numbers = slots.device
    if numbers is None:
        numbers = torch.tensor(slots.host, dtype=torch.int64, device=pool.device)
    stores = numbers >= 0 if alive is None else (numbers >= 0) & alive
    # Who stores nothing repeats the store of the first who does; if nobody does, slot 0 gets its own value back.
    source = torch.where(stores, torch.arange(len(numbers), device=pool.device), stores.to(torch.int8).argmax())
    target = numbers.index_select(0, source).clamp(min=0)
    values = states.index_select(0, source).to(pool.dtype)
    values = torch.where(stores.any(), values, pool.index_select(0, target))
    pool.index_copy_(0, target, values)
