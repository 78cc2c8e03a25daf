"""Every threshold of the tuner, with the reason for its value. Nothing here measures or decides.

Ratios are relative (0.03 is 3 %), times are seconds unless the name says otherwise. Each record is
frozen and checked on construction, so a policy that exists is a usable one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import ArgumentValueError

__all__ = ["MeasurePolicy", "PromotionPolicy", "RacePolicy", "ScreenPolicy", "TunePolicy"]


def _require(condition: bool, argument: str, expected: str, given: object) -> None:
    if not condition:
        raise ArgumentValueError(argument, expected, repr(given))


def _require_fraction(argument: str, value: float) -> None:
    _require(0.0 < value < 1.0, argument, "a number between 0 and 1, both excluded", value)


@dataclass(frozen=True, slots=True)
class ScreenPolicy:
    """Few samples of many candidates: find out who is worth racing.

    Attributes:
        first_samples: samples per candidate after its first call. Five give a median that one outlier, and
            even two, cannot move.
        keep: finalists besides the protected ones. The race's cost is linear in it, and beyond eight the
            next candidate is in practice another setting of a kernel that is already in.
        drop_ratio: dropped when the median exceeds this times the best. Far above noise (about 1 %) and
            clock drift (about 5 %), so the coarse measurement cannot drop a possible winner.
        abandon_ratio: no further samples when the first calls all exceed this times the best so far. The
            very first is cold (caches, page faults, lazy module load), which costs up to about 3x.
        abandon_calls: so many calls must exceed it. With one, a candidate that stalls once in twenty calls
            would be lost in one tuning run of twenty; the second call costs a hopeless one little.
    """

    first_samples: int = 5
    keep: int = 8
    drop_ratio: float = 1.5
    abandon_ratio: float = 4.0
    abandon_calls: int = 2

    def __post_init__(self) -> None:
        _require(self.first_samples >= 1, "first_samples", "at least 1", self.first_samples)
        _require(self.keep >= 1, "keep", "at least 1", self.keep)
        _require(self.drop_ratio > 1.0, "drop_ratio", "more than 1", self.drop_ratio)
        _require(self.abandon_ratio >= self.drop_ratio, "abandon_ratio", "drop_ratio or more", self.abandon_ratio)
        _require(self.abandon_calls >= 1, "abandon_calls", "at least 1", self.abandon_calls)


@dataclass(frozen=True, slots=True)
class RacePolicy:
    """Interleaved blocks with a look after each round.

    Attributes:
        rounds: blocks added before each look. Doubling spends little on clear losers and leaves most samples
            to the close ones; few looks keep the union bound cheap.
        significance: probability that the race as a whole eliminates a candidate that did not deserve it,
            shared out over all looks and all candidates (union bound).
        indifference: a difference below this is nobody's gain: run-to-run differences of one binary (code
            placement, page colouring) are of this size and no amount of sampling removes them.
        min_blocks: blocks that the wall-clock cap cannot take away; fewer give no usable interval.
        wall_cap_s: stop after this many seconds of measuring one problem. Reached only by slow problems,
            where each sample is long and therefore precise.
        sentinel_drift: a block whose sentinel (a fixed kernel timed with it) moved by more than this against
            the last kept blocks is discarded: the clock or a neighbour changed inside it, so its pairs lie.
        sentinel_window: kept blocks whose median sentinel is the baseline. Short, since slow drift is
            harmless to paired differences and must not look like a disturbance.
        max_disturbed_in_row: so many disturbed blocks in a row are a new steady state (a lower clock), not a
            disturbance; the baseline moves there and the race counts a rebase.
        max_discarded: discarded blocks after which the machine is too restless to go on.
    """

    rounds: tuple[int, ...] = (5, 10, 20, 40)
    significance: float = 0.01
    indifference: float = 0.005
    min_blocks: int = 5
    wall_cap_s: float = 10.0
    sentinel_drift: float = 0.05
    sentinel_window: int = 5
    max_disturbed_in_row: int = 3
    max_discarded: int = 30

    def __post_init__(self) -> None:
        _require(
            len(self.rounds) > 0 and all(r >= 1 for r in self.rounds),
            "rounds",
            "one or more positive block counts",
            self.rounds,
        )
        _require_fraction("significance", self.significance)
        _require(0.0 <= self.indifference < 1.0, "indifference", "0 or more, below 1", self.indifference)
        _require(1 <= self.min_blocks <= self.max_blocks, "min_blocks", "1 to sum(rounds)", self.min_blocks)
        _require(self.wall_cap_s > 0.0, "wall_cap_s", "a positive number of seconds", self.wall_cap_s)
        _require_fraction("sentinel_drift", self.sentinel_drift)
        for name in ("sentinel_window", "max_disturbed_in_row", "max_discarded"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))

    @property
    def max_blocks(self) -> int:
        return sum(self.rounds)

    @property
    def looks(self) -> tuple[int, ...]:
        """Block counts at which the race looks at its data."""
        return tuple(sum(self.rounds[: i + 1]) for i in range(len(self.rounds)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RacePolicy:
        """The inverse of ``dataclasses.asdict``, through JSON (which has lists only)."""
        return cls(**{**fields, "rounds": tuple(fields["rounds"])})


@dataclass(frozen=True, slots=True)
class PromotionPolicy:
    """When a measured difference is worth acting on.

    Attributes:
        min_improvement: the holder (incumbent, else heuristic default) stays unless a challenger is faster by
            more than this. A new winner changes numerics and compile caches for every user, and a gain of
            1-2 % in isolation does not survive into a whole model.
        tie: candidates within this of the best are equals, and the declared order decides. About the
            resolution of a full race; the same choice on every machine is worth more than 1 %.
        significance: one-sided error of the intervals that promotion and ties are judged by.
    """

    min_improvement: float = 0.03
    tie: float = 0.01
    significance: float = 0.02

    def __post_init__(self) -> None:
        _require(0.0 <= self.tie < 1.0, "tie", "0 or more, below 1", self.tie)
        _require(self.tie <= self.min_improvement < 1.0, "min_improvement", "tie to 1", self.min_improvement)
        _require(0.0 < self.significance < 0.5, "significance", "between 0 and 0.5", self.significance)


@dataclass(frozen=True, slots=True)
class MeasurePolicy:
    """What one sample is. Part of the store's key: times taken under different policies do not compare.

    Attributes:
        mode: ``eager`` times the whole call with its host cost; ``graph`` times a replayed graph. Rankings
            differ by whole factors between the two, since host cost can exceed kernel time.
        min_sample_us: one sample repeats the launch until it lasts this long. Device events tick at about
            0.5 us, so 50 us keep the clock's quantum within 1 %.
        cold: the level-2 cache does not hold the inputs when a sample starts, as in a model where other
            layers ran in between.
        flush_l2: bytes written to flush, in multiples of the level-2 cache (one is not enough: the
            replacement is not strictly least-recently-used).
        rotate_l2: bytes of rotated inputs and state slots, in multiples of the level-2 cache.
        floor_tolerance: a time below this times the floor (bytes moved / the bandwidth that nothing exceeds) is
            impossible: the kernel did not do the work, or the clock is wrong. Below 1 as the bandwidth has its own
            error where it is measured.
    """

    mode: Literal["eager", "graph"] = "eager"
    min_sample_us: float = 50.0
    cold: bool = True
    flush_l2: float = 2.0
    rotate_l2: float = 5.0
    floor_tolerance: float = 0.9

    def __post_init__(self) -> None:
        _require(self.mode in ("eager", "graph"), "mode", "'eager' or 'graph'", self.mode)
        _require(self.min_sample_us > 0.0, "min_sample_us", "a positive number", self.min_sample_us)
        _require(self.flush_l2 >= 1.0, "flush_l2", "at least 1", self.flush_l2)
        _require(self.rotate_l2 >= 1.0, "rotate_l2", "at least 1", self.rotate_l2)
        _require(0.0 < self.floor_tolerance <= 1.0, "floor_tolerance", "above 0, at most 1", self.floor_tolerance)

    def launches_per_sample(self, launch_s: float) -> int:
        """How many launches of ``launch_s`` seconds make one sample long enough."""
        _require(math.isfinite(launch_s) and launch_s > 0.0, "launch_s", "positive, finite seconds", launch_s)
        return max(1, math.ceil(self.min_sample_us * 1e-6 / launch_s))

    def key(self) -> dict[str, str | float | bool]:
        """The flat mapping that goes into the environment hash."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TunePolicy:
    """The four policies of one tuning run."""

    screen: ScreenPolicy = field(default_factory=ScreenPolicy)
    race: RacePolicy = field(default_factory=RacePolicy)
    promotion: PromotionPolicy = field(default_factory=PromotionPolicy)
    measure: MeasurePolicy = field(default_factory=MeasurePolicy)
