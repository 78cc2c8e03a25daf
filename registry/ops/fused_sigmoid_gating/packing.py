"""The order in which the reference takes tokens: those with the same place in their sequence side by side.

Sequences are ordered by length, the longest first, so that those with a token at place t are a prefix of them. What
exists once per token lies place by place, and at a place sequence by sequence; a step of all sequences is a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

__all__ = ["Packing", "settle"]


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the tokens of N sequences lie. "Position" is an index into the order above.

    Attributes:
        offsets: ``N + 1`` row offsets of the sequences into the call's tokens.
        order: the sequences, the longest first.
        sizes: by place: how many sequences have a token there.
        bases: by place, and one beyond: the position of its first token.
        rows: ``[positions]`` rows of the call's tokens.
        places, ranks: ``[positions]`` place in the sequence, and which sequence of ``order``.
        firsts: by place: ``bases``, on the device.
        lengths, starts: ``[N]`` of the sequences in ``order``: tokens, and the row of the first.
    """

    offsets: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]
    bases: tuple[int, ...]
    rows: torch.Tensor
    places: torch.Tensor
    ranks: torch.Tensor
    firsts: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, offsets: tuple[int, ...], device: torch.device) -> Packing:
        lengths = [y - x for x, y in pairwise(offsets)]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        sizes, live = [], len(order)
        for t in range(max(lengths, default=0)):
            while lengths[order[live - 1]] <= t:
                live -= 1
            sizes.append(live)
        by_place = [(t, rank) for t, size in enumerate(sizes) for rank in range(size)]

        def on(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        bases = tuple(accumulate(sizes, initial=0))
        return cls(
            offsets,
            tuple(order),
            tuple(sizes),
            bases,
            on([offsets[order[rank]] + t for t, rank in by_place]),
            on([t for t, _ in by_place]),
            on([rank for _, rank in by_place]),
            on(bases[:-1]),
            on([lengths[i] for i in order]),
            on([offsets[i] for i in order]),
        )

    @property
    def longest(self) -> int:
        return len(self.sizes)

    def span(self, first: int, last: int) -> slice:
        """The positions of places ``first`` up to ``last``."""
        return slice(self.bases[first], self.bases[last])

    def live(self, place: int) -> int:
        """How many sequences have a token at ``place``."""
        return self.sizes[place] if place < len(self.sizes) else 0

    def blocks(self, first: int, last: int, tokens: int) -> Iterator[tuple[int, int]]:
        """``first`` to ``last`` in runs of places with at most so many tokens, and at least one place."""
        begin = first
        for t in range(first + 1, last + 1):
            if t == last or self.bases[t + 1] - self.bases[begin] > tokens:
                yield begin, t
                begin = t

    def rectangle(self, first: int, last: int) -> Rectangle:
        """Places ``first`` up to ``last`` of every sequence that has one at ``first``."""
        n, span, device = self.sizes[first], self.span(first, last), self.rows.device
        if self.sizes[last - 1] == n:
            tokens = torch.arange(span.start, span.stop, device=device).view(-1, n).T
            return Rectangle(tokens, torch.ones_like(tokens, dtype=torch.bool), span, None)
        ranks, places = torch.arange(n, device=device)[:, None], torch.arange(first, last, device=device)
        there = places < self.lengths[:n, None]
        tokens = torch.where(there, self.firsts[first:last] + ranks, self.bases[first] + ranks)
        return Rectangle(tokens, there, span, self.ranks[span] * (last - first) + self.places[span] - first)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Some tokens with an axis for the sequences, n, and one for the places, C, some of which are not there.

    Attributes:
        tokens: ``[n, C]`` positions; any valid one where there is no token.
        there: ``[n, C]`` which tokens there are.
        span: their positions.
        back: ``[positions]`` for each of them its index into the n * C; None where all are there.
    """

    tokens: torch.Tensor
    there: torch.Tensor
    span: slice
    back: torch.Tensor | None

    def of(self, x: torch.Tensor, missing: float = 0.0, before: int = 0) -> torch.Tensor:
        """``[positions, heads, dim]`` from position ``before`` on as ``[n * heads, C, dim]``."""
        if self.back is None:
            packed = x[self.span.start - before : self.span.stop - before]
            return packed.reshape(-1, len(self.tokens), *x.shape[1:]).permute(1, 2, 0, 3).flatten(0, 1)
        there = self.there[:, None, :, None]
        return torch.where(there, x[self.tokens - before].transpose(1, 2), missing).flatten(0, 1)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """``[n * heads, C, dim]`` as ``[positions, heads, dim]``, what is not there left out."""
        x = x.reshape(len(self.tokens), -1, *x.shape[1:])
        return x.permute(2, 0, 1, 3).flatten(0, 1) if self.back is None else x.transpose(1, 2).flatten(0, 1)[self.back]


def settle(carried: torch.Tensor, values: Sequence[torch.Tensor]) -> None:
    """Leave each sequence's last value in ``carried``; ``values``: place by place, of ever fewer sequences."""
    sizes = [len(x) for x in values]
    for x, size, fewer in zip(values, sizes, [*sizes[1:], 0], strict=True):
        if fewer < size:
            carried[fewer:size] = x[fewer:]
