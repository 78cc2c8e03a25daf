"""Runs: the consecutive sequences of a batch that lie on the same side of a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layout import SequenceLayout

__all__ = ["Run", "Span", "spans_of"]


@dataclass(frozen=True, slots=True)
class Span:
    """Sequences ``[first, last)``, which hold the rows ``[start, stop)``; ``long``: on which side they lie."""

    first: int
    last: int
    start: int
    stop: int
    long: bool


@dataclass(frozen=True, slots=True)
class Run:
    """A span, and its sequences as a batch of their own: ``layout``, whose offsets start at 0."""

    span: Span
    layout: SequenceLayout


def spans_of(offsets: Sequence[int], threshold: int) -> tuple[Span, ...]:
    """The sequences of ``offsets`` (``[N + 1]``) in batch order, cut wherever a longer than ``threshold`` follows
    one that is not, or the other way round.

    An empty sequence lies on neither side: it goes with what comes before it, at the start with what comes after. So
    every sequence is in exactly one span, except that a batch without a token has no span at all.
    """
    spans: list[Span] = []
    for n in range(len(offsets) - 1):
        length = offsets[n + 1] - offsets[n]
        if not length:
            continue
        long = length > threshold
        if spans and spans[-1].long is long:
            continue
        first = n if spans else 0
        if spans:
            spans[-1] = _closed(spans[-1], first, offsets)
        spans.append(Span(first, first, offsets[first], offsets[first], long))
    if spans:
        spans[-1] = _closed(spans[-1], len(offsets) - 1, offsets)
    return tuple(spans)


def _closed(span: Span, last: int, offsets: Sequence[int]) -> Span:
    return Span(span.first, last, span.start, offsets[last], span.long)
