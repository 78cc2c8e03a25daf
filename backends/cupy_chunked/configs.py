"""The config space: columns of V per block of the scan, and chunks in flight.

``warps`` (2, 4, 8) of the scan's blocks have 16 columns of V each: fewer make more blocks, which fill a chip that has
few heads and sequences to work on; more share what a block brings to shared memory. ``stages`` (2 to 4) chunks are
there or on their way at a time, as many as fit or one less; 1 where no more fit. ``group``: four warps multiply
together (``wgmma``, Hopper alone) instead of each for itself. ``chunk`` is no choice: it is what the error bound is
computed from. No config changes a bit of the result.
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
#: Architectures with products of four warps.
_GROUPED = (90,)
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
    order = [(warps, False) for warps in (*wanted[:1], *(w for w in (4, 2, 8) if w != wanted[0]))]
    if problem.arch in _GROUPED:
        order = [(4, True), (8, True), *order]
    found = []
    for warps, group in order:
        if warps > (4 if group else 2) and 8 * warps >= problem.v:
            continue  # half of the columns would be beyond V
        fitting = [stages for stages in (4, 3, 2) if _fits(problem, _config(warps, stages, group), pieces)][:2]
        if not fitting and _fits(problem, _config(warps, 1, group), pieces):
            fitting = [1]
        found += [_config(warps, stages, group) for stages in fitting]
    return tuple(found)


def _config(warps: int, stages: int, group: bool) -> Config:
    return Config.of(chunk=CHUNK, warps=warps, stages=stages, group=group)


def _fits(problem: Problem, config: Config, pieces: int) -> bool:
    special = Specialization.of(problem, config, pieces)
    return max(special.scan_bytes, special.prepare_bytes) <= shared_limit(problem.arch)
