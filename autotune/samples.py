"""Robust statistics of timings, in log space, and the table of interleaved blocks they are taken from.

Times are positive seconds. Differences are ``log(t_a / t_b)``: dimensionless, symmetric in "twice as slow"
and "twice as fast", and free of the clock drift that both times of a block share.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..errors import IsokernError

__all__ = [
    "BlockTable",
    "LogEstimate",
    "TimingError",
    "below_floor",
    "checked_seconds",
    "format_seconds",
    "log_estimate",
    "mad_sigma",
    "percent",
    "sign_count",
    "t_quantile",
]

# The median absolute deviation of a Gaussian is 0.6745 standard deviations; this undoes it.
MAD_TO_SIGMA = 1.4826
# The median of n Gaussians has sqrt(pi / 2) times the standard error of their mean.
MEDIAN_INEFFICIENCY = math.sqrt(math.pi / 2.0)
# A MAD carries 37 % of the information on the scale that a standard deviation does, so that of n samples is
# known as well as a standard deviation with 0.37 * (n - 1) degrees of freedom.
MAD_EFFICIENCY = 0.37
# Besides the interval, a sign test at this level: a candidate with a second, slow mode can show it in most of five
# samples, and those agree so well with each other that the MAD calls it proven.
SIGN_TAIL = 0.05
# A median of fewer differences than this says nothing about their own error.
MIN_PAIRS = 3


class TimingError(IsokernError, ValueError):
    """A timing that no clock can return: zero, negative, NaN or infinite.

    Attributes: ``candidate``, ``seconds`` (as given).
    """

    def __init__(self, candidate: str, seconds: object) -> None:
        self.candidate = candidate
        self.seconds = seconds
        super().__init__(f"candidate {candidate!r}: a timing must be positive finite seconds, given {seconds!r}")


def checked_seconds(candidate: str, seconds: float) -> float:
    """``seconds`` as a float. Raises: TimingError if it is no possible duration."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | np.floating | np.integer):
        raise TimingError(candidate, seconds)
    value = float(seconds)
    if not math.isfinite(value) or value <= 0.0:
        raise TimingError(candidate, seconds)
    return value


def below_floor(seconds: float, floor_s: float, tolerance: float) -> bool:
    """Is this faster than the hardware allows: below ``tolerance * floor_s``? A floor of 0 is no floor."""
    if not (math.isfinite(floor_s) and floor_s >= 0.0):
        raise ValueError(f"floor_s: expected finite seconds, 0 or more, given {floor_s!r}")
    return seconds < tolerance * floor_s


def format_seconds(seconds: float) -> str:
    """Three digits in the unit an engineer would use: ``'1.23 us'``, ``'45.6 ms'``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def percent(log_ratio: float) -> str:
    """A log ratio as text: ``percent(log(1.018)) == '1.8 %'``."""
    return f"{100.0 * math.expm1(log_ratio):.1f} %"


def mad_sigma(values: NDArray[np.float64]) -> float:
    """Standard deviation from the median absolute deviation; up to half the values may be outliers."""
    return MAD_TO_SIGMA * float(np.median(np.abs(values - np.median(values))))


@lru_cache(maxsize=4096)
def t_quantile(upper_tail: float, degrees: float) -> float:
    """Student's t exceeded with probability ``upper_tail`` (0 to 0.5), for any real ``degrees`` >= 1.

    With t = sqrt(degrees) / tan(psi) the tail is a constant times the integral of sin(psi)**(degrees - 1).
    """
    if not (0.0 < upper_tail < 0.5 and degrees >= 1.0):
        raise ValueError(f"t_quantile: no quantile for tail {upper_tail!r} with {degrees!r} degrees of freedom")
    if degrees > 500.0:  # a Gaussian within 0.3 %, where the grid below gets too coarse
        return NormalDist().inv_cdf(1.0 - upper_tail)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    u = (np.arange(512) + 0.5) / 512  # psi = end * u**2 is smooth at 0 where degrees < 2 is not
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        end = (low + high) / 2
        tail = constant * float(np.mean(np.sin(end * u * u) ** (degrees - 1) * (2 * end * u)))
        low, high = (end, high) if tail < upper_tail else (low, end)
    return math.sqrt(degrees) / math.tan((low + high) / 2)


@lru_cache(maxsize=1024)
def sign_count(pairs: int, tail: float) -> int:
    """The least count of ``pairs`` fair coins that has a probability of ``tail`` or less; above ``pairs`` if none."""
    count, probability = pairs + 1, 0.0
    while count > 0:
        probability += math.comb(pairs, count - 1) / 2.0**pairs
        if probability > tail:
            break
        count -= 1
    return count


@dataclass(frozen=True, slots=True)
class LogEstimate:
    """A median log ratio with its error.

    Attributes:
        pairs: how many differences it is the median of.
        centre: the median; always finite; 0.0 if there are no pairs.
        stderr: its standard error, ``inf`` below three pairs.
        degrees: degrees of freedom behind ``stderr``.
    """

    pairs: int
    centre: float
    stderr: float
    degrees: float

    def low(self, tail: float) -> float:
        """The log ratio is below this with probability ``tail`` only."""
        return self.centre - self._width(tail)

    def high(self, tail: float) -> float:
        """The log ratio is above this with probability ``tail`` only."""
        return self.centre + self._width(tail)

    def _width(self, tail: float) -> float:
        return t_quantile(tail, self.degrees) * self.stderr


def log_estimate(differences: NDArray[np.float64], *, sigma_floor: float = 0.0, pooled: int = 1) -> LogEstimate:
    """Median of ``differences`` with a standard error from their MAD.

    Args:
        differences: paired log ratios, 1-d.
        sigma_floor: the standard deviation of one difference is not believed to be below this. With few pairs
            the MAD comes out near zero by chance, and a coarse clock makes it exactly zero.
        pooled: how many comparisons the floor was estimated from. A floor known from several is safer than
            one MAD; sqrt is on the safe side of what simulation gives for 2 to 10 comparisons.
    """
    pairs = len(differences)
    centre = float(np.median(differences)) if pairs else 0.0
    degrees = max(1.0, MAD_EFFICIENCY * (pairs - 1) * math.sqrt(max(1, pooled)))
    if pairs < MIN_PAIRS:
        return LogEstimate(pairs, centre, math.inf, degrees)
    sigma = max(mad_sigma(differences), sigma_floor)
    return LogEstimate(pairs, centre, MEDIAN_INEFFICIENCY * sigma / math.sqrt(pairs), degrees)


class BlockTable:
    """Complete blocks: each holds one time of every candidate that was still in the race.

    Args:
        resolution: the clock's quantum relative to one sample (0.01 = 1 %); 0 for a fine clock.
    """

    def __init__(self, resolution: float = 0.0) -> None:
        if not (math.isfinite(resolution) and resolution >= 0.0):
            raise ValueError(f"resolution: expected a finite number, 0 or more, given {resolution!r}")
        self.resolution = resolution
        self._times: list[dict[str, float]] = []
        self._logs: list[dict[str, float]] = []

    def __len__(self) -> int:
        return len(self._logs)

    def append(self, times: Mapping[str, float]) -> None:
        """Add a block. Raises: TimingError, and then nothing was added."""
        block = {name: checked_seconds(name, t) for name, t in times.items()}
        self._times.append(block)
        self._logs.append({name: math.log(t) for name, t in block.items()})

    def seconds(self, name: str) -> tuple[float, ...]:
        """All times of ``name`` in order of measurement."""
        return tuple(block[name] for block in self._times if name in block)

    def differences(self, a: str, b: str) -> NDArray[np.float64]:
        """``log(t_a / t_b)`` over the blocks that hold both."""
        return np.array([block[a] - block[b] for block in self._logs if a in block and b in block])

    def compare(self, a: str, b: str, among: Collection[str]) -> LogEstimate:
        """How much slower ``a`` is than ``b``; ``among`` are the candidates whose noise counts as typical."""
        differences = self.differences(a, b)
        scales = [mad_sigma(d) for d in (self.differences(c, b) for c in among if c != b) if len(d) >= MIN_PAIRS]
        # Two roundings to the quantum, each uniform with standard deviation quantum / sqrt(12).
        floor = self.resolution / math.sqrt(6.0)
        if scales:
            floor = max(floor, float(np.median(scales)))
        return log_estimate(differences, sigma_floor=floor, pooled=len(scales))

    def proven_slower(self, a: str, b: str, by: float, tail: float, among: Collection[str]) -> bool:
        """Is ``log(t_a / t_b)`` above ``by``, with an error probability of ``tail``? Two tests must agree on it."""
        estimate = self.compare(a, b, among)
        if estimate.low(tail) <= by:
            return False
        above = int(np.count_nonzero(self.differences(a, b) > by))
        return above >= sign_count(estimate.pairs, SIGN_TAIL)

    def leader(self, among: Sequence[str]) -> str | None:
        """The candidate with the lowest median position within its blocks (the first of equals).

        A position is the log time minus the block's median, so neither drift nor a slow block moves it.
        None while no block holds all of ``among``.
        """
        rows = [[block[c] for c in among] for block in self._logs if all(c in block for c in among)]
        if not among or not rows:
            return None
        logs = np.array(rows)
        positions = np.median(logs - np.median(logs, axis=1, keepdims=True), axis=0)
        return among[int(np.argmin(positions))]
