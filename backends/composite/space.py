"""The settings worth trying: a backend for the short sequences, one for the long ones, and where the line is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from ...registry.backend import Backend, Config, works_in_chunks
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .bound import bound_of, common
from .part import Part, capable, may_run_beside
from .profiles import long_part, short_part, thresholds

__all__ = ["MOST_CONFIGS", "Sides", "configs", "sides_of"]

MOST_CONFIGS = 10
#: Tokens of prompts that a stream of their own is worth to, and that take a chunked kernel longer than walking.
_WALKED = 16, 32
#: Further configs of the chunked backend, and backends of each kind, that are tried.
_FEW = 2


@dataclass(frozen=True, slots=True)
class Sides:
    """Who may run the parts of a batch, each in heuristic order.

    Attributes:
        short, long: the parts as problems. for_short, for_long: the backends that accept them; none of the former cuts.
        rounded: a backend that rounds operands is to run one of them.
    """

    short: Problem
    long: Problem
    for_short: tuple[Backend, ...]
    for_long: tuple[Backend, ...]
    rounded: bool

    @property
    def chunked(self) -> tuple[Backend, ...]:
        """Those of the long part that work in chunks, and where some part has to round, round."""
        kind = (b for b in self.for_long if works_in_chunks(b))
        return tuple(b for b in kind if b.accuracy == "rounded" or not self.rounded)

    @property
    def cutting(self) -> tuple[Backend, ...]:
        """Those of these that cut sequences, where that may pay."""
        return tuple(b for b in self.chunked if b.cuts and b.hopeless(self.long) is None)

    @property
    def walking(self) -> tuple[Backend, ...]:
        """Those of the long part that work token by token."""
        return tuple(b for b in self.for_long if not works_in_chunks(b))

    @property
    def pair(self) -> tuple[Backend, Backend]:
        """The default: the first of each part, but for the long one a chunked backend wherever there is one.

        Two kinds of kernel are what splitting is for; one kind alone has hardly a reason to be called twice, but for
        :attr:`side_by_side`.
        """
        return self.for_short[0], (self.for_long if self.side_by_side else self.chunked or self.for_long)[0]

    @property
    def side_by_side(self) -> bool:
        """Whether both parts are best walked over, at the same time: a prompt of a few tokens, in a CUDA graph."""
        longest = self.long.profile.longest or 0
        few = self.long.mode == "graph" and _WALKED[0] <= longest <= _WALKED[1]
        return few and not self.rounded and self.for_long[0] in self.walking


def sides_of(backends: Mapping[str, Backend], problem: Problem, rounded: bool) -> Sides:
    """The parts of a batch of ``problem``'s profile."""
    return _sides(tuple(backends.values()), problem, rounded)


@lru_cache(maxsize=64)  # asked several times for each new problem, and looking for what is not installed takes a while
def _sides(backends: tuple[Backend, ...], problem: Problem, rounded: bool) -> Sides:
    short, long = short_part(problem), long_part(problem)
    whole = (b for b in backends if not b.cuts)
    return Sides(short, long, tuple(capable(whole, short)), tuple(capable(backends, long)), rounded)


def configs(sides: Sides, problem: Problem) -> Sequence[Config]:
    """At most :data:`MOST_CONFIGS`, the default first."""
    found = (config for config in _tried(sides, problem) if config is not None)
    return tuple(islice(dict.fromkeys(found), MOST_CONFIGS))


def _tried(sides: Sides, problem: Problem) -> Iterator[Config | None]:
    first, second = sides.pair
    lines = thresholds(problem)
    # Beside one another there is more to gain the less a part fills the GPU: the rest is tried that way. From the host
    # the second stream's events cost more than they gain on small batches; in a CUDA graph they cost nothing.
    most = 2 if problem.device == "cuda" else 1
    by_graph = most > 1 and problem.mode == "graph"
    for streams in (2, 1) if by_graph else range(1, most + 1):
        yield _config(sides, first, second, lines[0], streams)
    for line in lines[1:]:
        yield _config(sides, first, second, line, most)
    for config in second.configs(sides.long)[1 : 1 + _FEW] if works_in_chunks(second) else ():
        yield _config(sides, first, second, lines[0], most, config)
    for short, long in (
        *((first, long) for long in sides.walking[:1]),
        *((short, second) for short in sides.for_short[1:_FEW]),
        *((first, long) for long in (*sides.chunked[1:_FEW], *sides.cutting[:1])),
    ):
        yield _config(sides, short, long, lines[0], most)


def _config(
    sides: Sides, short: Backend, long: Backend, threshold: int, streams: int, of_long: Config | None = None
) -> Config | None:
    """None where no bound covers both parts, or nothing rounds though something should."""
    for_short = short.configs(sides.short)[0]
    for_long = long.configs(sides.long)[0] if of_long is None else of_long
    bound = common(bound_of(short, for_short), bound_of(long, for_long))
    if bound is None or bound.rounded is not sides.rounded:
        return None
    return Config.of(
        chunk=bound.tokens,
        cut=bound.cut,
        long=str(Part.of(long, for_long)),
        short=str(Part.of(short, for_short)),
        streams=streams if may_run_beside(short) and may_run_beside(long) else 1,
        threshold=threshold,
    )
