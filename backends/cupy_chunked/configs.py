"""The config space: columns of V per block of the scan, and chunks in flight.

``warps`` (2, 4, 8) of the scan's blocks have 16 columns of V each: fewer make more blocks, which fill a chip that has
few heads and sequences to work on; more share what a block brings to shared memory. ``stages`` (2, 3) chunks are there
or on their way at a time, or 1 where no more fit. ``chunk`` is no choice: it is what the error bound is computed from.
No config changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .arguments import CHUNK
from .specialization import Specialization

__all__ = ["configs", "shared_limit"]

#: Shared memory that one block may ask for, by architecture; of others the least of them.
_SHARED = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
_LEAST_SHARED = 99 << 10
#: Streaming multiprocessors of the chips aimed at, near enough.
_SMS = 132


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that a block may have on ``arch`` (compute capability times ten)."""
    return _SHARED.get(arch, _LEAST_SHARED)


def configs(problem: Problem, pieces: int) -> Sequence[Config]:
    """What fits the chip; the first is the heuristic default. Empty if nothing does.

    The default has as many columns per block as still give every multiprocessor a block, or else the fewest.
    """
    heads = max(1, problem.profile.n) * problem.hv
    wanted = [warps for warps in (8, 4, 2) if heads * -(-problem.v // (16 * warps)) >= _SMS] or [2]
    order = [*wanted[:1], *(warps for warps in (4, 2, 8) if warps != wanted[0])]
    found = []
    for warps in order:
        if warps > 2 and 8 * warps >= problem.v:
            continue  # half of the columns would be beyond V
        fitting = [stages for stages in (3, 2, 1) if _fits(problem, _config(warps, stages), pieces)]
        found += [_config(warps, stages) for stages in fitting if stages > 1 or fitting == [1]]
    return tuple(found)


def _config(warps: int, stages: int) -> Config:
    return Config.of(chunk=CHUNK, warps=warps, stages=stages)


def _fits(problem: Problem, config: Config, pieces: int) -> bool:
    special = Specialization.of(problem, config, pieces)
    return max(special.scan_bytes, special.prepare_bytes) <= shared_limit(problem.arch)
