"""The config space: columns of V per block of the scan, and chunks in flight.

``warps`` (2, 4, 8) of the scan's blocks have 16 columns of V each: fewer make more blocks, which fill a chip that has
few heads and sequences to work on; more share what a block brings to shared memory. ``stages`` (2 to 4) chunks are
there or on their way at a time, as many as fit or one less; 1 where no more fit. ``group``: four warps multiply
together (``wgmma``, Hopper alone) instead of each for itself. ``heads``: value heads of a block of the first kernel,
all that share a query/key head, which then multiply keys once, or 1, which makes more and shorter blocks. ``chunk`` is
no choice: it is what the error bound is computed from. No config changes a bit of the result, but for ``cut``: tokens
of the segments that the backends which cut sequences work on side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .arguments import CHUNK
from .specialization import Specialization

__all__ = ["configs", "cut_configs", "shared_limit"]

#: Shared memory that one block may ask for, by architecture; of others the least of them.
_SHARED = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
_LEAST_SHARED = 99 << 10
#: Architectures with products of four warps.
_GROUPED = (90,)
#: Streaming multiprocessors of the chips aimed at, near enough.
_SMS, _NEARLY_ALL = 132, 120
#: Blocks of the first kernel that a multiprocessor has at once before they are in one another's way.
_AT_ONCE = 3
#: Segments of a sequence: they are joined one after another.
_MOST_SEGMENTS = 32


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
        many = _long_heads(problem) * -(-problem.v // 128) >= _NEARLY_ALL  # wide blocks share more, if all have one
        order = [(8, True), (4, True), *order] if many else [(4, True), (8, True), *order]
    found = []
    for warps, group in order:
        if warps > (4 if group else 2) and 8 * warps >= problem.v:
            continue  # half of the columns would be beyond V
        fitting = [stages for stages in (4, 3, 2) if _fits(problem, _config(warps, stages, group), pieces)][:2]
        if not fitting and _fits(problem, _config(warps, 1, group), pieces):
            fitting = [1]
        found += [_config(warps, stages, group) for stages in fitting]
    return _with_heads(problem, found)


def cut_configs(problem: Problem, pieces: int) -> Sequence[Config]:
    """The same for sequences cut into segments: as many as fill the multiprocessors with blocks, or half.

    ``local`` is ``warps`` of the pass that finds what segments do to a state; it has K more columns.
    """
    chunks, heads = max(1, -(-_longest(problem) // CHUNK)), _long_heads(problem)
    grouped = problem.arch in _GROUPED
    alone = [(4, 4, False), (2, 2, False)]
    kinds = [(4, 8, True), (4, 4, True), (8, 8, True), alone[problem.v <= 32]] if grouped else alone
    if 2 * heads * -(-problem.v // 64) >= _NEARLY_ALL:
        kinds[:2] = reversed(kinds[:2])  # two segments or so: narrow blocks fill the chip in the first pass too
    found, most = [], max(problem.k, problem.v)
    for warps, local, group in kinds:
        if any(w > (4 if group else 2) and 8 * w >= size for w, size in ((warps, problem.v), (local, most))):
            continue  # half of the columns would be beyond V
        blocks = heads * -(-problem.v // (16 * warps))
        segments = min(_MOST_SEGMENTS, 1 << max(2, _SMS // blocks).bit_length() - 1)
        halved = warps == local and group == grouped and segments > 2
        for parts in (segments, segments // 2) if halved else (segments,):
            found.append((warps, local, group, -(-chunks // parts) * CHUNK))
    fitting = []
    for warps, local, group, cut in dict.fromkeys(found):
        offered = [_config(warps, stages, group, cut=cut, local=local) for stages in (4, 3, 2, 1)]
        fitting += [config for config in offered if _fits(problem, config, pieces)][:1]
    return _with_heads(problem, fitting)


def _with_heads(problem: Problem, configs: Sequence[Config]) -> tuple[Config, ...]:
    """The configs with the ``heads`` that suit the batch; the first one with the other choice as well, behind it."""
    sharing = problem.hv // problem.h
    chunks = problem.profile.tokens // CHUNK + problem.profile.n
    usual = 1 if chunks * problem.hv <= _AT_ONCE * _SMS else sharing
    made = [Config.of(**config.to_dict() | {"heads": usual}) for config in configs]
    if sharing > 1 and made:
        made.insert(1, Config.of(**configs[0].to_dict() | {"heads": 1 + sharing - usual}))
    return tuple(made)


def _longest(problem: Problem) -> int:
    return max(1, problem.profile.longest or problem.profile.tokens)


def _long_heads(problem: Problem) -> int:
    """Value heads of sequences about as long as the longest: there are at most tokens / longest of these."""
    return max(1, problem.profile.tokens // _longest(problem)) * problem.hv


def _config(warps: int, stages: int, group: bool, **more: int) -> Config:
    return Config.of(chunk=CHUNK, heads=1, warps=warps, stages=stages, group=group, **more)


def _fits(problem: Problem, config: Config, pieces: int) -> bool:
    special = Specialization.of(problem, config, pieces)
    return max(special.block(kernel)[1] for kernel in special.kernels) <= shared_limit(problem.arch)
