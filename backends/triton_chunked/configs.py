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
#: Columns of V. 64 compile for half a minute, and were at best 3 % ahead on an H100.
_COLUMNS = (32, 16)
_FEWEST = 16


def configs(problem: Problem) -> Sequence[Config]:
    """The first is the heuristic default: the most columns that still give every multiprocessor a program, or 16."""
    pairs = max(1, problem.profile.n) * problem.hv
    widest = max(_FEWEST, 1 << (problem.v - 1).bit_length())
    tiles = dict.fromkeys(min(columns, widest) for columns in _COLUMNS)

    def idle(tile: int) -> int:
        return max(0, _SMS - pairs * -(-problem.v // tile))

    return tuple(Config.of(chunk=CHUNK, v_tile=tile, warps=4, stages=1, prepare=8) for tile in sorted(tiles, key=idle))
