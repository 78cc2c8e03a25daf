"""The sequences of a call in working order, and how a step's work is cut into blocks of sequences and heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["Block", "Heads", "Sequences", "blocks", "head_blocks"]


@dataclass(frozen=True, slots=True)
class Heads:
    """Consecutive value heads ``[first, first + count)`` and the ``keys`` key heads they use.

    ``count == keys * group``: a block holds whole groups of value heads, or a part of one.
    """

    first: int
    count: int
    first_key: int
    keys: int

    @property
    def group(self) -> int:
        """Value heads per key head, inside this block."""
        return self.count // self.keys

    @property
    def values(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def key_heads(self) -> slice:
        return slice(self.first_key, self.first_key + self.keys)


@dataclass(frozen=True, slots=True)
class Block:
    """Sequences ``[first, last)`` in working order, and some heads: what is worked on at a time."""

    first: int
    last: int
    heads: Heads

    @property
    def n(self) -> int:
        return self.last - self.first


def head_blocks(hv: int, group: int, most: int) -> Iterator[Heads]:
    """Cut ``hv`` value heads into blocks of at most ``most``: whole groups if one fits, else equal parts of one."""
    if most >= group:
        step = min(hv, most // group * group)
        pieces = -(-hv // step)
        step = -(-(hv // group) // pieces) * group  # equal shares: 40 heads in blocks of 32 become 20 + 20
    else:
        step = max(d for d in range(1, max(most, 1) + 1) if group % d == 0)
    for first in range(0, hv, step):
        count = min(step, hv - first)
        yield Heads(first, count, first // group, max(1, count // group))


def blocks(sequences: Sequences, hv: int, group: int, states: int) -> Iterator[Block]:
    """Cut the working order into blocks of at most ``states`` (sequence, value head) pairs, at least one.

    Sequences share a block only when all their heads fit: their states then lie together in memory.
    """
    step = max(1, states // hv)
    for first in range(0, sequences.count, step):
        last = min(first + step, sequences.count)
        for heads in head_blocks(hv, group, states // (last - first)):
            yield Block(first, last, heads)


class Sequences:
    """A call's sequences, longest first where the host knows the lengths, else in the caller's order.

    Attributes:
        call: the call.
        on_host: whether the lengths may be used on the host.
        count: sequences to work on; the host leaves out empty ones, the device masks them.
        steps: steps until the last sequence has ended; an upper bound where only the device knows.
        lengths: tokens of each sequence in working order, on the host; empty where only the device knows.
        starts: first row of each, likewise.
        order: ``order[i]`` is the caller's number of sequence i.
    """

    def __init__(self, call: Call, on_host: bool) -> None:
        self.call = call
        self.on_host = on_host
        self.order: tuple[int, ...] = tuple(range(call.n))
        self.lengths: tuple[int, ...] = ()
        self.starts: tuple[int, ...] = ()
        self.count = call.n
        if on_host:
            offsets = call.offsets
            lengths = [end - start for start, end in pairwise(offsets)]
            self.order = tuple(sorted(self.order, key=lambda n: -lengths[n]))
            self.count = call.n - lengths.count(0)
            self.lengths = tuple(lengths[n] for n in self.order[: self.count])
            self.starts = tuple(offsets[n] for n in self.order[: self.count])
            self.steps = max(self.lengths, default=0)
        else:
            bound = call.q.shape[1] if call.max_seqlen is None else call.max_seqlen
            for steps in (call.intermediates, call.parents):
                if steps is not None:
                    bound = min(bound, steps.shape[1])  # no sequence may be longer than what stores its steps
            self.steps = bound if self.count else 0

    def live(self, block: Block, t: int) -> int:
        """How many of the block's sequences are longer than ``t``: a prefix. All of them where lengths are unknown."""
        if not self.on_host:
            return block.n
        lengths = self.lengths[block.first : block.last]
        if lengths[-1] > t:
            return block.n
        return sum(1 for length in lengths if length > t)

    def longest(self, block: Block) -> int:
        """Steps the block takes."""
        return self.lengths[block.first] if self.on_host else self.steps

    @cached_property
    def _device_order(self) -> torch.Tensor | None:
        """``order`` on the device, computed there (no transfer); None where it is the caller's."""
        if self.order == tuple(range(self.call.n)):
            return None
        return torch.argsort(self._cu.diff(), descending=True, stable=True)

    @cached_property
    def _cu(self) -> torch.Tensor:
        assert self.call.cu_seqlens is not None
        return self.call.cu_seqlens.to(torch.int64)

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """``values [N, ...]`` in working order, on their device."""
        return values if self._device_order is None else values.index_select(0, self._device_order)

    @cached_property
    def device_lengths(self) -> torch.Tensor:
        """``[N]`` int64, in working order."""
        return self.in_order(self._cu.diff())

    @cached_property
    def device_starts(self) -> torch.Tensor:
        """``[N]`` int64, in working order."""
        return self.in_order(self._cu[:-1])
