"""The two parts of a batch of which only the profile is known: so many decode rows beside so many prompts.

Used where a choice is needed before there is a batch: for the settings offered and for compiling ahead. A call's parts
are described by their own lengths.
"""

from __future__ import annotations

from dataclasses import replace

from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.varlen.profile import VarlenProfile

__all__ = ["THRESHOLDS", "long_part", "short_part", "thresholds"]

#: Tokens up to which a sequence counts as short, the first being the default. A kernel that walks over the tokens takes
#: time in proportion to their number, a chunked one about the same for 1 token as for 64; the two meet in between.
THRESHOLDS = (32, 8, 128)


def thresholds(problem: Problem) -> tuple[int, ...]:
    """Those of :data:`THRESHOLDS` that divide such a batch; the default first, at least one."""
    longest = problem.profile.longest or 1
    useful = [t for t in THRESHOLDS if 2 * t < longest]
    return tuple(useful) or (max(1, longest // 4),)


def long_part(problem: Problem) -> Problem:
    """Of prompts that are as long as the batch's longest, as many as hold half the bucket's tokens."""
    profile = problem.profile
    longest = profile.longest or 1
    n = max(1, min(profile.n - 1, (profile.tokens // 2 + 1) // longest))
    return replace(problem, profile=VarlenProfile.of(n, n * longest, longest))


def short_part(problem: Problem) -> Problem:
    """Of decode rows: the batch's other sequences."""
    profile = problem.profile
    longs = max(1, min(profile.n - 1, (profile.tokens // 2 + 1) // (profile.longest or 1)))
    n = max(1, profile.n - longs)
    return replace(problem, profile=VarlenProfile.of(n, n, 1))
