"""Length classes: how unequal the packed sequences of one batch are.

The class is part of a tuning key, so it is computed from host-known numbers only and its thresholds stand
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

__all__ = ["MILD_MAX_RATIO", "UNIFORM_MAX_RATIO", "LengthClass", "class_of_lengths", "length_class"]

#: Longest over mean up to which a kernel that works per sequence loses at most a fifth of its time to waiting
#: for the longest one: the batch behaves as if all sequences were equal.
UNIFORM_MAX_RATIO = 1.25

#: Longest over mean beyond which the longest sequence, and no longer the total, decides the time of such a
#: kernel. One prompt beside decode rows lies far beyond (17 to 112 in production traces), prompts of ordinary
#: spread packed together lie below.
MILD_MAX_RATIO = 4.0


class LengthClass(StrEnum):
    """How the longest sequence compares with the mean of the non-empty ones."""

    DECODE = "decode"  # no sequence is longer than one token
    UNIFORM = "uniform"  # longest / mean <= UNIFORM_MAX_RATIO
    MILD = "mild"  # longest / mean <= MILD_MAX_RATIO
    HEAVY = "heavy"  # beyond
    UNKNOWN = "unknown"  # the longest length is not known on the host


def length_class(n: int, tokens: int, longest: int | None, *, empty: int = 0) -> LengthClass:
    """The class of ``n`` sequences holding ``tokens`` tokens, the longest of them ``longest``.

    Runs in the dispatch path, so it checks nothing: the caller has validated the counts.

    Args:
        n: number of sequences, empty ones included.
        tokens: total number of tokens.
        longest: length of the longest sequence, or an upper bound of it; None if the host does not know.
            Then ``tokens == n`` reads as decode, a lone sequence is its own longest, and all else is unknown.
        empty: how many of the ``n`` are known to hold no token; the mean is taken over the others.
    """
    if tokens == 0:
        return LengthClass.DECODE
    if longest is None:
        if tokens == n:
            return LengthClass.DECODE
        return LengthClass.UNIFORM if n == 1 else LengthClass.UNKNOWN
    if longest <= 1:
        return LengthClass.DECODE
    # longest / mean, multiplied out; both thresholds are exact in binary, so no boundary case is rounded.
    spread = longest * (n - empty)
    if spread <= UNIFORM_MAX_RATIO * tokens:
        return LengthClass.UNIFORM
    return LengthClass.MILD if spread <= MILD_MAX_RATIO * tokens else LengthClass.HEAVY


def class_of_lengths(lengths: Sequence[int]) -> LengthClass:
    """The class of fully known ``lengths`` (tokens per sequence)."""
    return length_class(len(lengths), sum(lengths), max(lengths, default=0), empty=lengths.count(0))
