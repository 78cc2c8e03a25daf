"""The settings worth trying on a problem, a default first.

    v_tile  rows of V per program: more programs and fewer registers, against more copies of the work on q and k
    k_span  keys per piece of a tile (see ``tiles``): more lanes along K, so less of that work per lane, more shuffles
    warps   warps per program
    depth   tokens whose q, k, v and gates are read ahead; 0 where every sequence is one token

None of them changes a bit of the result (see ``tiles``).
"""

from __future__ import annotations

from collections.abc import Iterator

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .arguments import CHAINS

__all__ = ["configs"]

#: (v_tile, k_span, warps) by layout and bytes per state element, best guess first. Spans of 16 with one warp, and of
#: 32 with two or more, let the compiler read q and k straight into the lanes that need them, through no shared memory.
_GEOMETRY: dict[tuple[str, int], tuple[tuple[int, int, int], ...]] = {
    ("vk", 4): ((16, 32, 2), (16, 16, 1), (8, 16, 1), (8, 32, 2), (32, 32, 4), (16, 32, 4), (64, 32, 4)),
    ("vk", 2): ((16, 32, 2), (16, 16, 1), (8, 16, 1), (32, 32, 2), (32, 32, 4), (64, 32, 4)),
    ("kv", 4): ((16, 16, 1), (8, 16, 1), (32, 16, 1), (16, 32, 1)),
    ("kv", 2): ((16, 16, 1), (32, 16, 1), (8, 16, 1), (16, 32, 1)),
}
#: With a gate per key every lane would also compute the gates of its keys. One warp and spans of 32 let the compiler
#: compute each gate in one lane and hand it on.
_KDA_GEOMETRY = ((8, 32, 1), (16, 32, 1), (16, 32, 2), (32, 32, 4), (8, 16, 1))
#: State elements per thread beyond which registers spill, by depth: tokens read ahead take registers too.
_MOST_PER_THREAD = {0: 128, 1: 64, 2: 64}
#: Reading two tokens ahead is for when one is too late to hide a read from memory: for the likeliest geometries.
_TRIED_AT_DEPTH_2 = 3
#: Warp schedulers of the GPUs these defaults are for (132 multiprocessors of four).
_SCHEDULERS = 528
_BYTES = {None: 4, "float32": 4, "bfloat16": 2, "float16": 2}


def configs(problem: Problem) -> tuple[Config, ...]:
    """Candidates for ``problem``; never empty."""
    offered = []
    for depth in (0,) if problem.profile.longest == 1 else (1, 2):
        geometries = tuple(dict.fromkeys(_geometries(problem, _MOST_PER_THREAD[depth])))
        geometries = _enough_programs_first(problem, geometries)
        if depth == 2:
            geometries = geometries[:_TRIED_AT_DEPTH_2]
        offered += [
            Config.of(v_tile=v_tile, k_span=span, warps=warps, depth=depth) for v_tile, span, warps in geometries
        ]
    return tuple(offered)


def _geometries(problem: Problem, most_per_thread: int) -> Iterator[tuple[int, int, int]]:
    bytes_each = _BYTES[problem.state_dtype]
    table = _KDA_GEOMETRY if problem.is_kda else _GEOMETRY[problem.state_layout, bytes_each]
    widest, longest = _power_of_two(problem.v), min(CHAINS, _power_of_two(problem.k))
    for v_tile, span, warps in ((min(v, widest), min(k, longest), warps) for v, k, warps in table):
        pieces = -(-problem.k // span)
        if v_tile * pieces * span <= most_per_thread * 32 * warps:
            yield v_tile, span, warps
    # All of V in one program: q, k and the gates are read once per head.
    yield widest, longest, max(1, min(16, widest * _power_of_two(problem.k) // (32 * 64)))


def _enough_programs_first(
    problem: Problem, geometries: tuple[tuple[int, int, int], ...]
) -> tuple[tuple[int, int, int], ...]:
    """Few heads of few sequences are limited by latency: first what leaves no warp scheduler idle."""
    pairs = max(1, problem.profile.n) * problem.hv

    def idle(geometry: tuple[int, int, int]) -> int:
        v_tile, _, warps = geometry
        return max(0, _SCHEDULERS // 2 - pairs * -(-problem.v // v_tile) * warps)

    return tuple(sorted(geometries, key=idle))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
