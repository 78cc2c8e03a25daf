"""The config space: how a block divides the state, and which division to try first.

``lanes`` (4, 8, 16) share a group of ``rows`` (1 to 8) rows of V, each lane holding K / lanes channels of them; a block
has ``warps`` (1 to 8) warps, each of which stages ``tokens`` tokens at a time; ``stream`` marks states as not to be
kept in the caches. No choice changes a bit of the result (``kernels/shape.cuh`` says why), only the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .specialization import shared_bytes

__all__ = ["configs"]

#: Static shared memory every block may have.
_SHARED = 48 << 10
#: State values per thread beyond which the registers do not suffice.
_VALUES = 128
#: Streaming multiprocessors of the chips aimed at, near enough: H100 has 132, B200 148, A100 108.
_SMS = 132

#: Below this many rows of V in flight (all sequences and heads) a decode step is bound by latency, not bandwidth.
_LATENCY_ROWS = 32 * _SMS

#: (lanes, rows, warps, tokens): short chains first, then wide loads. Measured choices come from the tuner.
_SHAPES = (
    (8, 2, 4, 2),
    (8, 4, 4, 2),
    (8, 4, 4, 1),
    (8, 1, 4, 2),
    (8, 1, 2, 4),
    (8, 1, 1, 2),
    (8, 2, 2, 2),
    (8, 4, 2, 2),
    (8, 4, 1, 4),
    (16, 1, 4, 2),
    (16, 2, 4, 2),
    (16, 8, 4, 1),
    (4, 1, 4, 2),
    (4, 2, 2, 2),
)


def configs(problem: Problem) -> Sequence[Config]:
    """The configs that fit ``problem``, the heuristic default first."""
    first = _default(problem)
    offered = dict.fromkeys(_fitting(problem, first))
    return tuple(offered)


def _default(problem: Problem) -> tuple[int, int, int, int]:
    rows_in_all = max(problem.profile.n, 1) * problem.hv * problem.v
    if problem.profile.longest == 1:
        # Decode. Few rows: spread them over the chip. Many: 16 bytes per access along either axis, deep queues.
        if rows_in_all <= _LATENCY_ROWS:
            return (8, 1, 4 if 2 * rows_in_all > _LATENCY_ROWS else 2, 1)
        return (8, 4, 4, 1)
    if rows_in_all <= 16 * _SMS:
        return (8, 1, 2, 4)  # fewer rows than schedulers can hold warps: one short chain each
    return (8, 2, 4, 2)  # the most registers that leave four blocks on an SM


def _fitting(problem: Problem, first: tuple[int, int, int, int]) -> Iterator[Config]:
    narrow = (problem.state_dtype or problem.intermediate_dtype or "float32") != "float32"
    vector = 8 if narrow else 4
    decode = problem.profile.longest == 1

    def fits(lanes: int, rows: int, warps: int, tokens: int) -> bool:
        values = rows * -(-problem.k // (vector * lanes)) * vector
        tile = warps * (32 // lanes) * rows
        shared = shared_bytes(problem.k, lanes, rows, warps, tokens, problem.is_kda, vector)
        useful = tile < 2 * problem.v or (rows == 1 and warps == 1)
        return values <= _VALUES and shared <= _SHARED and useful and not (decode and tokens > 1)

    def made(lanes: int, rows: int, warps: int, tokens: int, stream: bool = True) -> Config:
        return Config.of(lanes=lanes, rows=rows, warps=warps, tokens=tokens, stream=stream)

    def shrunk(lanes: int, rows: int, warps: int, tokens: int) -> Iterator[tuple[int, int, int, int]]:
        """The preferred shape, then smaller ones: something always fits."""
        while True:
            yield lanes, rows, warps, tokens
            if tokens > 1:
                tokens //= 2
            elif rows > 1:
                rows //= 2
            elif warps > 1:
                warps //= 2
            elif lanes < 16:
                lanes *= 2
            else:
                raise AssertionError(f"no config fits K={problem.k} V={problem.v}")  # up to 256 one always does

    preferred = next(shape for shape in shrunk(*first) if fits(*shape))
    yield made(*preferred)
    if decode:
        yield made(*preferred, stream=False)
    for lanes, rows, warps, tokens in _SHAPES:
        shape = (lanes, rows, warps, 1 if decode else tokens)
        if fits(*shape):
            yield made(*shape)
