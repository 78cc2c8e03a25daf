"""VarlenProfile: the part of a problem that describes how a batch's tokens fall into sequences, in buckets."""

from __future__ import annotations

from dataclasses import dataclass

from .classes import LengthClass, length_class

__all__ = ["VarlenProfile", "bucket"]


def bucket(value: int) -> int:
    """The bucket ``value`` falls into: 0, or the next power of two. 5 and 8 share bucket 8."""
    if value < 0:
        raise ValueError(f"bucket: expected a count >= 0, given {value}")
    return 0 if value == 0 else 1 << (value - 1).bit_length()


@dataclass(frozen=True, slots=True)
class VarlenProfile:
    """Buckets of a batch of packed (or equal-length) sequences.

    Attributes:
        n: bucket of the number of sequences.
        tokens: bucket of the total number of tokens.
        longest: bucket of the longest sequence; None when the host does not know it.
        length_class: how the lengths are spread (see :class:`LengthClass`).
    """

    n: int
    tokens: int
    longest: int | None
    length_class: LengthClass

    @classmethod
    def of(cls, n: int, tokens: int, longest: int | None) -> VarlenProfile:
        """Profile of ``n`` sequences holding ``tokens`` tokens, the longest having ``longest`` (None: unknown).

        An unknown ``longest`` is only ever derived where it is certain: as many tokens as sequences reads as
        decode (each of length one), which costs speed, never correctness, when it is wrong.
        """
        kind = length_class(n, tokens, longest)
        known = 1 if longest is None and kind is LengthClass.DECODE else longest
        return cls(bucket(n), bucket(tokens), None if known is None else bucket(known), kind)

    @property
    def label(self) -> str:
        """``"N<=64 tokens<=64 longest<=1 decode"``."""
        longest = "?" if self.longest is None else str(self.longest)
        return f"N<={self.n} tokens<={self.tokens} longest<={longest} {self.length_class.value}"
