"""The config space: how a block divides the state, how tokens come to it, and which choice to try first.

``lanes`` (4, 8, 16) share a group of ``rows`` (1 to 8) rows of V, each lane holding K / lanes channels of them; a block
has ``warps`` warps of such groups. Tokens are ``staged`` in shared memory, ``tokens`` at a time by each of ``helpers``
further warps (or, without any, by the warps themselves), or read by every lane for itself, ``tokens`` (0, 1) ahead.
``landing`` lets a state arrive by way of shared memory, so that no register waits for it; ``stream`` marks states as
not to be kept in the caches; the compiler leaves registers for ``resident`` blocks on an SM. No choice changes a bit of
the result (``kernels/shape.cuh`` says why), only the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.varlen.classes import LengthClass
from .specialization import landing_bytes, stage_bytes

__all__ = ["configs"]

#: Static shared memory every block may have.
_SHARED = 48 << 10
#: State values per thread beyond which the registers do not suffice, without and with states stored at every step.
_VALUES = {"none": 128, "chain": 64, "tree": 64}
#: Streaming multiprocessors of the chips aimed at, near enough: H100 has 132, B200 148, A100 108.
_SMS = 132
#: Below this many rows of V in flight (all sequences and heads) a decode step is bound by latency, not bandwidth.
_LATENCY_ROWS = 32 * _SMS


@dataclass(frozen=True, slots=True)
class _Choice:
    """A config before it is known to fit."""

    lanes: int
    rows: int
    warps: int
    helpers: int = 0
    staged: bool = False
    landing: bool = False
    tokens: int = 0
    stream: bool = True
    resident: int = 1

    def config(self) -> Config:
        return Config.of(
            lanes=self.lanes,
            rows=self.rows,
            warps=self.warps,
            helpers=self.helpers,
            staged=self.staged,
            landing=self.landing,
            tokens=self.tokens,
            stream=self.stream,
            resident=self.resident,
        )


def _landed(lanes: int, rows: int, warps: int, resident: int = 1, *, tokens: int = 0, stream: bool = True) -> _Choice:
    return _Choice(lanes, rows, warps, landing=True, tokens=tokens, stream=stream, resident=resident)


def _direct(lanes: int, rows: int, warps: int, resident: int = 1, *, tokens: int = 0, stream: bool = True) -> _Choice:
    return _Choice(lanes, rows, warps, tokens=tokens, stream=stream, resident=resident)


def _staged(
    lanes: int, rows: int, warps: int, tokens: int, helpers: int = 0, resident: int = 1, *, stream: bool = True
) -> _Choice:
    return _Choice(lanes, rows, warps, helpers, staged=True, tokens=tokens, stream=stream, resident=resident)


#: Decode, K contiguous. Little work: two rows a lane, small blocks, as many SMs as there are. Much: bytes in flight.
_DECODE_VK = (
    _landed(8, 2, 2, 10),
    _landed(8, 2, 1),
    _landed(8, 2, 4),
    _landed(8, 1, 2),
    _landed(8, 1, 4),
    _landed(16, 2, 2),
    _landed(16, 1, 4),
    _landed(16, 4, 2, 8),
    _landed(8, 4, 1),
    _landed(8, 4, 2, 8),
    _landed(8, 4, 2, 8, stream=False),
    _landed(8, 4, 4, 4),
    _landed(4, 2, 2),
    _direct(8, 2, 2, 12),
    _direct(8, 2, 1),
    _direct(8, 1, 4),
    _direct(8, 4, 2, 8),
    _direct(16, 2, 4),
    _direct(16, 4, 2),
    _staged(8, 2, 2, 1),
    _staged(8, 2, 4, 1),
    _staged(16, 2, 4, 1),
    _staged(4, 2, 2, 1),
)
#: Decode, V contiguous: a warp's access covers 32 / lanes * rows values of V, so few lanes and many rows make whole
#: cache lines, and blocks that hold all of V read and write states from end to end.
_DECODE_KV = (
    _landed(8, 4, 2, 8),
    _landed(8, 4, 4, 4),
    _landed(8, 4, 4, 4, stream=False),
    _landed(8, 2, 2, 10),
    _landed(8, 2, 4),
    _landed(4, 2, 2),
    _landed(4, 2, 4),
    _landed(4, 1, 4),
    _landed(8, 8, 2),
    _direct(4, 4, 1),
    _direct(4, 4, 2),
    _direct(4, 4, 4),
    _direct(4, 4, 4, stream=False),
    _direct(4, 2, 8),
    _direct(8, 4, 8, 2),
    _direct(8, 4, 8, 2, stream=False),
    _direct(8, 8, 4),
    _direct(8, 2, 4),
    _staged(4, 4, 4, 1),
    _staged(4, 4, 4, 1, stream=False),
    _staged(4, 4, 2, 1),
    _staged(4, 2, 2, 1),
    _staged(8, 4, 8, 1),
    _staged(8, 4, 8, 1, stream=False),
)
#: Sequences. With helpers: the chain from token to token, with nothing else in its way. Without: the most work per SM.
_SEQUENCES = (
    _staged(8, 2, 4, 2, 4),
    _staged(8, 2, 4, 4, 2),
    _staged(8, 2, 4, 8, 1, 2),
    _staged(8, 2, 4, 4, 1, 2),
    _staged(8, 1, 4, 2, 4),
    _staged(8, 1, 4, 4, 2),
    _staged(8, 1, 2, 4, 2),
    _staged(8, 1, 1, 4, 2),
    _staged(8, 1, 1, 4, 1),
    _staged(16, 2, 4, 2, 4),
    _staged(16, 1, 4, 4, 2),
    _staged(8, 2, 2, 4, 2),
    _staged(8, 4, 2, 4, 2),
    _staged(8, 4, 4, 4, 1),
    _staged(8, 4, 4, 4, 1, 3),
    _staged(4, 1, 4, 2, 4),
    _staged(8, 2, 4, 2),
    _staged(8, 2, 4, 2, 0, 4),
    _staged(8, 2, 4, 2, 4, 2),
    _staged(8, 2, 2, 2, 0, 8),
    _staged(8, 4, 4, 1),
    _staged(8, 4, 4, 1, 0, 4),
    _staged(8, 4, 4, 2, 0, 3),
    _staged(4, 4, 4, 1),
    _staged(4, 4, 2, 1),
    _staged(4, 2, 4, 2),
    _staged(16, 8, 4, 1),
)
#: A few tokens each: reading them directly costs less than meeting for them.
_SHORT = (
    _landed(8, 4, 2, 8, tokens=1),
    _landed(8, 4, 4, 3, tokens=1),
    _landed(8, 2, 2, 10, tokens=1),
    _landed(16, 4, 2, 8, tokens=1),
    _direct(4, 4, 2, tokens=0),
)
_LONGEST_SHORT = 8


def configs(problem: Problem) -> Sequence[Config]:
    """The configs that fit ``problem``, the heuristic default first."""
    return tuple(dict.fromkeys(choice.config() for choice in _fitting(problem)))


def _default(problem: Problem) -> _Choice:
    rows = max(problem.profile.n, 1) * problem.hv * problem.v
    kv = problem.state_layout == "kv"
    narrow = (problem.state_dtype or "float32") != "float32"  # half the bytes per row, so twice the rows per lane
    if problem.profile.longest == 1:
        if problem.is_kda:
            return _staged(8, 4, 4, 1) if rows > _LATENCY_ROWS else _staged(8, 1, 4, 1)
        if kv:
            few = _landed(4, 2, 2) if rows > _LATENCY_ROWS else _landed(8, 2, 2, 10)
            return _direct(4, 4, 4, stream=False) if rows > 2 * _LATENCY_ROWS else few
        if rows <= (2 if narrow else 4) * _LATENCY_ROWS:
            return _landed(8, 2, 2, 10)
        return _landed(8, 4, 2, 8) if narrow else _direct(16, 4, 2)
    if problem.profile.length_class is LengthClass.HEAVY and rows > 2 * _LATENCY_ROWS:
        # The chains of the few long ones are what is waited for.
        return _staged(4, 1, 4, 2, 4) if kv else _staged(8, 2, 4, 2, 4)
    if kv and problem.intermediates != "none":
        chained = problem.intermediates == "tree" or rows <= 2 * _LATENCY_ROWS
        return _staged(4, 1, 4, 2, 4) if chained else _staged(4, 2, 4, 2)
    if rows <= 16 * _SMS:
        return _staged(8, 1, 2, 4, 2)  # fewer rows than schedulers can hold warps: one short chain each
    if rows <= 2 * _LATENCY_ROWS:
        return _staged(8, 2, 4, 2, 4)
    if kv:
        return _staged(4, 2, 4, 2)
    return _staged(8, 4, 4, 1, 0, 4) if problem.profile.longest in (2, 4) else _staged(8, 2, 4, 2, 0, 4)


def _offered(problem: Problem) -> Iterator[_Choice]:
    if problem.profile.longest == 1:
        yield from _DECODE_VK if problem.state_layout == "vk" else _DECODE_KV
        return
    if (problem.profile.longest or _LONGEST_SHORT + 1) <= _LONGEST_SHORT:
        yield from _SHORT
    yield from _SEQUENCES


def _fitting(problem: Problem) -> Iterator[_Choice]:
    narrow = (problem.state_dtype or problem.intermediate_dtype or "float32") != "float32"
    vector = 8 if narrow else 4

    def fits(choice: _Choice) -> bool:
        values = choice.rows * -(-problem.k // (vector * choice.lanes)) * vector
        tile = choice.warps * (32 // choice.lanes) * choice.rows
        useful = tile < 2 * problem.v or (choice.rows == 1 and choice.warps == 1)
        if choice.staged:
            shared = stage_bytes(problem.k, choice.config(), problem.is_kda, vector)
        else:
            shared = landing_bytes(problem.k, choice.config(), vector) if choice.landing else 0
        fitting = values <= _VALUES[problem.intermediates]
        return fitting and shared <= _SHARED and useful and (choice.staged or not problem.is_kda)

    yield next(choice for choice in _shrunk(_default(problem)) if fits(choice))
    for offered in _offered(problem):
        by_channel = problem.is_kda and problem.profile.longest == 1 and not offered.staged
        choice = replace(offered, staged=True, landing=False, tokens=1) if by_channel else offered
        if fits(choice):
            yield choice


def _shrunk(choice: _Choice) -> Iterator[_Choice]:
    """The choice, then smaller ones: something always fits."""
    while True:
        yield choice
        if choice.tokens > 1:
            choice = replace(choice, tokens=choice.tokens // 2)
        elif choice.rows > 1:
            choice = replace(choice, rows=choice.rows // 2)
        elif choice.warps > 1:
            choice = replace(choice, warps=choice.warps // 2, helpers=min(choice.helpers, 1))
        elif choice.lanes < 16:
            choice = replace(choice, lanes=choice.lanes * 2)
        else:
            raise AssertionError(f"nothing fits that is smaller than {choice}")  # K and V up to 256 always do
