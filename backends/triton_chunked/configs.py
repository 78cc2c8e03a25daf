"""The config space.

    v_tile   columns of V per program of the scan: fewer make more programs, more share what a program reads
    warps    of a program of the scan
    stages   how far ahead the compiler may read what products take
    prepare  warps of a program of ``prepare``

``chunk`` is no choice: it is what the error bound is computed from. None changes which sums are made.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .arguments import CHUNK

__all__ = ["configs"]

#: Multiprocessors of the chips aimed at, near enough.
_SMS = 132
#: (columns of V, warps of the scan, warps of ``prepare``), with 128 columns at most.
_TRIED = ((64, 8, 8), (32, 4, 8), (64, 4, 8), (16, 4, 8))
#: Architecture from which eight warps of 64 columns are no kernel that spills kilobytes.
_WIDE_FROM = 90
#: Keys of a state beyond which wide tiles would not fit the registers.
_LONG_KEY = 128


def configs(problem: Problem) -> Sequence[Config]:
    """The first is the heuristic default: the most columns that still give every multiprocessor a program, or 16."""
    pairs = max(1, problem.profile.n) * problem.hv
    widest = max(16, 1 << (problem.v - 1).bit_length())
    most = 64 if problem.k > _LONG_KEY else 128
    found: dict[tuple[int, int, int], None] = {}
    for columns, warps, first in _TRIED:
        if columns <= most and (warps == 4 or problem.arch >= _WIDE_FROM):
            tile = min(columns, widest)
            found[tile, warps, first] = None

    def idle(key: tuple[int, int, int]) -> int:
        return max(0, _SMS - pairs * -(-problem.v // key[0]))

    return tuple(
        Config.of(chunk=CHUNK, v_tile=tile, warps=warps, stages=1, prepare=first)
        for tile, warps, first in sorted(found, key=idle)
    )
