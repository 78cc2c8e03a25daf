"""The settings worth trying on a problem, a default first.

    v_tile     rows of V per program: more programs and fewer registers, against more copies of the work on q and k
    k_span     keys per piece of a tile (see ``tiles``): more lanes along K, less of that work per lane, more shuffles
    warps      warps per program
    window     tokens whose norms and gates are computed at once (see ``kernel``); 0 where every sequence is one token
    stream     states pass the first level of cache by, and leave the second first
    registers  most per thread, or 0: as the compiler likes. 168 let twelve one-warp programs share a multiprocessor

None of them changes a bit of the result (see ``tiles``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .arguments import CHAINS

__all__ = ["configs"]


@dataclass(frozen=True, slots=True)
class _Settings:
    v_tile: int
    k_span: int
    warps: int
    window: int = 0
    stream: bool = False
    registers: int = 0

    def config(self) -> Config:
        return Config.of(
            v_tile=self.v_tile,
            k_span=self.k_span,
            warps=self.warps,
            window=self.window,
            stream=self.stream,
            registers=self.registers,
        )


#: (v_tile, k_span, warps) by layout and bytes per state element, best guess first. Spans of 16 with one warp, and of
#: 32 with two or more, let the compiler read q and k straight into the lanes that need them, through no shared memory.
#: One token: enough warps to keep enough bytes in flight.
_ONE_TOKEN: dict[tuple[str, int], tuple[tuple[int, int, int], ...]] = {
    ("vk", 4): ((16, 32, 2), (32, 32, 4), (16, 16, 1), (8, 16, 1), (8, 32, 2), (64, 32, 4)),
    ("vk", 2): ((32, 32, 2), (32, 32, 4), (16, 32, 2), (32, 32, 1), (64, 32, 2), (16, 16, 1), (8, 16, 1), (64, 32, 4)),
    ("kv", 4): ((32, 16, 1), (16, 16, 1), (16, 32, 1), (8, 16, 1), (32, 16, 2)),
    ("kv", 2): ((32, 16, 1), (16, 16, 1), (64, 16, 2), (64, 32, 2), (64, 16, 1), (16, 32, 1), (8, 16, 1)),
}
#: Several: programs of one warp need no barrier, and where rows are many each lane's work on q and k serves more.
_TOKENS: dict[tuple[str, int], tuple[tuple[int, int, int], ...]] = {
    ("vk", 4): ((16, 16, 1), (32, 16, 1), (8, 16, 1), (16, 32, 2), (32, 32, 2), (64, 32, 4)),
    ("vk", 2): ((16, 16, 1), (32, 16, 1), (8, 16, 1), (16, 32, 2), (32, 32, 2), (64, 32, 4)),
    ("kv", 4): ((16, 16, 1), (32, 16, 1), (16, 32, 1), (8, 16, 1)),
    ("kv", 2): ((32, 16, 1), (16, 32, 1), (16, 16, 1)),
}
#: With a gate per key every lane would also compute the gates of its keys. One warp and spans of 32 let the compiler
#: compute each gate in one lane and hand it on.
_KDA = ((16, 32, 1), (8, 32, 1), (16, 32, 2), (32, 32, 4), (8, 16, 1))
#: Beyond this K spans are 32: the compiler's time grows with the square of the number of pieces.
_LONG_KEY = 128
#: State elements per thread beyond which registers spill.
_MOST_PER_THREAD = 128
#: Windows: one warp shares out 4 tokens' keys without a remainder; more warps take 8.
_WINDOW, _WIDE_WINDOW = 4, 8
#: Of each default these many are also tried with the other settings.
_VARIED = 3
#: Registers per thread with which twelve programs of one warp fit on a multiprocessor; the compiler may take more.
_REGISTERS = 168
#: Warp schedulers of the GPUs these defaults are for (132 multiprocessors of four).
_SCHEDULERS = 528
_BYTES = {None: 4, "float32": 4, "bfloat16": 2, "float16": 2}


def configs(problem: Problem) -> tuple[Config, ...]:
    """Candidates for ``problem``; never empty."""
    one_token = problem.profile.longest == 1
    offered = list(dict.fromkeys(_settings(problem, one_token)))
    offered = _enough_programs_first(problem, offered, _SCHEDULERS // (3 if one_token else 2))
    varied = [replace(s, stream=True) for s in offered[:_VARIED]]
    if not one_token:
        varied += [replace(s, window=2 * s.window) for s in offered[:_VARIED]]
        varied += [replace(s, registers=_REGISTERS) for s in offered[:_VARIED] if s.v_tile >= 16 * s.warps]
    return tuple(s.config() for s in (*offered, *varied))


def _settings(problem: Problem, one_token: bool) -> Iterator[_Settings]:
    bytes_each = _BYTES[problem.state_dtype]
    table = (_ONE_TOKEN if one_token else _TOKENS)[problem.state_layout, bytes_each]
    widest, longest = _power_of_two(problem.v), min(CHAINS, _power_of_two(problem.k))

    def settings(v_tile: int, k_span: int, warps: int) -> _Settings:
        window = 0 if one_token else _WINDOW if warps == 1 else _WIDE_WINDOW
        span = min(CHAINS if problem.k > _LONG_KEY else k_span, longest)
        return _Settings(min(v_tile, widest), span, warps, window)

    for geometry in _KDA if problem.is_kda else table:
        made = settings(*geometry)
        pieces = -(-problem.k // made.k_span)
        if made.v_tile * pieces * made.k_span <= _MOST_PER_THREAD * 32 * made.warps:
            yield made
    # All of V in one program: q, k and the gates are read once per head.
    yield settings(widest, longest, max(1, min(16, widest * _power_of_two(problem.k) // (32 * 64))))


def _enough_programs_first(problem: Problem, offered: list[_Settings], warps: int) -> list[_Settings]:
    """Few heads of few sequences are limited by latency: first what has this many warps, or the most."""
    pairs = max(1, problem.profile.n) * problem.hv

    def missing(settings: _Settings) -> int:
        return max(0, warps - pairs * -(-problem.v // settings.v_tile) * settings.warps)

    return sorted(offered, key=missing)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
