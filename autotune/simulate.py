"""A synthetic device with known true times, and whole tuning runs on it.

It answers the question that a real device cannot: how often, and by how much, is the choice wrong? Used to
test the decision logic and to choose the thresholds in :mod:`.policy`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .policy import TunePolicy
from .race import Race
from .samples import checked_seconds
from .screen import Screen
from .select import Selection, select

__all__ = ["Noise", "SyntheticDevice", "Trial", "argmin_of_means", "tune"]


@dataclass(frozen=True, slots=True)
class Noise:
    """How a synthetic device misbehaves; the defaults are an idle data-centre GPU with unlocked clocks.

    Attributes:
        sigma: standard deviation of log time.
        outlier_rate, outlier_scale: share of samples that take longer, and the mean of their relative excess
            (exponentially distributed): interrupts, page faults, a neighbour.
        spikes: per candidate ``(rate, factor)``: with this probability a sample takes ``factor`` times as
            long.
        drift, drift_samples: the clock slows down by this ratio, linearly over so many samples, then stays.
        step, step_at: at this sample the clock slows down by this ratio at once (a power limit sets in).
        quantum_s: times are rounded to multiples of this, and are at least one.
    """

    sigma: float = 0.012
    outlier_rate: float = 0.04
    outlier_scale: float = 0.5
    spikes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    drift: float = 0.0
    drift_samples: int = 500
    step: float = 0.0
    step_at: int = 0
    quantum_s: float = 0.0


class SyntheticDevice:
    """Times candidates that do not exist.

    Args:
        times: true seconds per candidate.
        noise: what the samples add to them.
        seed: of the generator; same seed and same calls, same samples.

    Attributes: ``samples``, how many were taken.
    """

    def __init__(self, times: Mapping[str, float], noise: Noise | None = None, seed: int = 0) -> None:
        self.times = {name: checked_seconds(name, t) for name, t in times.items()}
        self.noise = noise or Noise()
        self.samples = 0
        self._rng = np.random.default_rng(seed)

    @property
    def slowdown(self) -> float:
        """True time now over true time at the start."""
        noise = self.noise
        ramp = min(1.0, self.samples / noise.drift_samples) if noise.drift else 0.0
        stepped = noise.step if noise.step and self.samples >= noise.step_at else 0.0
        return (1.0 + noise.drift * ramp) * (1.0 + stepped)

    def time(self, candidate: str) -> float:
        """One sample in seconds."""
        return self._sample(self.times[candidate], self.noise.spikes.get(candidate, (0.0, 1.0)))

    def sentinel(self) -> float:
        """One sample of a fixed 20 us kernel."""
        return self._sample(20e-6, (0.0, 1.0))

    def regret(self, candidate: str) -> float:
        """How much slower than the best the candidate truly is, as a ratio minus 1."""
        return self.times[candidate] / min(self.times.values()) - 1.0

    def _sample(self, true: float, spike: tuple[float, float]) -> float:
        noise = self.noise
        # Four draws always, so that one candidate's samples do not depend on another's outliers.
        gauss, kind, excess, spiked = (
            self._rng.standard_normal(),
            self._rng.random(),
            self._rng.standard_exponential(),
            self._rng.random(),
        )
        seconds = true * self.slowdown * math.exp(noise.sigma * gauss)
        if kind < noise.outlier_rate:
            seconds *= 1.0 + noise.outlier_scale * excess
        if spiked < spike[0]:
            seconds *= spike[1]
        self.samples += 1
        if noise.quantum_s:
            seconds = max(1.0, round(seconds / noise.quantum_s)) * noise.quantum_s
        return seconds


@dataclass(frozen=True, slots=True)
class Trial:
    """One whole tuning run. ``samples`` counts screen and race; ``regret`` is the winner's true loss."""

    selection: Selection
    samples: int
    regret: float
    finalists: tuple[str, ...]
    race: Race


def tune(
    device: SyntheticDevice,
    candidates: Sequence[str],
    *,
    incumbent: str | None = None,
    default: str | None = None,
    policy: TunePolicy | None = None,
    seed: int = 0,
    sentinel: bool = False,
    in_passes: bool = True,
) -> Trial:
    """Screen, race and select as the tuner does, on a synthetic device.

    Args:
        sentinel: time the sentinel with every block, so that disturbed blocks are discarded.
        in_passes: the screen visits the candidates in passes; if False it finishes one after the other, which
            under drift favours those that come first.
    """
    policy = policy or TunePolicy()
    protected = tuple(dict.fromkeys(name for name in (incumbent, default) if name is not None))
    before = device.samples
    screen = Screen(candidates, protected, policy.screen)
    while pending := screen.pending():
        for name in pending:
            for _ in range(1 if in_passes else screen.wants(name)):
                if screen.wants(name):
                    screen.record(name, device.time(name))
    finalists = screen.result().finalists
    race = Race(finalists, protected, policy.race, policy.promotion, seed=seed)
    while not race.finished:
        times = {name: device.time(name) for name in race.next_block()}
        race.record(times, sentinel_s=device.sentinel() if sentinel else None)
    selection = select(race.result(), incumbent=incumbent, default=default)
    return Trial(selection, device.samples - before, device.regret(selection.winner), finalists, race)


def argmin_of_means(device: SyntheticDevice, candidates: Sequence[str], samples: int = 100) -> str:
    """The usual tuner: ``samples`` of each candidate, one candidate after the other, the lowest mean wins.

    Here to be compared with; it flips between near-ties and follows clock drift.
    """
    means = {name: statistics.fmean(device.time(name) for _ in range(samples)) for name in candidates}
    return min(candidates, key=means.__getitem__)
