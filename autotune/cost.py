"""How long tuning a problem will take, roughly: a guess for a plan, corrected by what earlier runs took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cache.entry import Entry
from .tuner import Settings, Task

__all__ = ["CostModel"]

#: Seconds on the machine the model was made on for a probe to take (see ``_probe``): others are scaled by theirs.
_PROBE_S = 1.0e-3

# Seconds per problem: loading, JIT, round trips. Per candidate: its first calls and gate, beside what follows.
_PER_PROBLEM = 6.0
_PER_CANDIDATE = 0.3
#: Seconds per step and candidate: three references with their bounds, one step of the longest sequence at a time.
_PER_TOKEN = 1.5e-3
#: Seconds per byte of state and candidate: inputs are made and compared several times in the gate.
_PER_STATE_BYTE = 2.0e-8


@dataclass(frozen=True, slots=True)
class CostModel:
    """Estimates seconds per problem; ``scale`` is this machine's against the model's.

    Attributes: ``scale``; ``source``, where it comes from, in words.
    """

    scale: float
    source: str

    @classmethod
    def calibrated(cls, earlier: Sequence[tuple[Task, Entry]], settings: Settings) -> CostModel:
        """From earlier entries of the same environment if there are any, else from a quick measurement."""
        flat = cls(1.0, "")
        ratios = [
            entry.measured["seconds"] / flat.seconds(task, len(entry.candidates), settings)
            for task, entry in earlier
            if entry.measured["seconds"] > 0
        ]
        if ratios:
            return cls(statistics.median(ratios), f"{len(ratios)} earlier entries")
        return cls(max(0.25, _probe() / _PROBE_S), "a quick measurement")

    def seconds(self, task: Task, candidates: int, settings: Settings) -> float:
        """Wall seconds to tune ``task`` with so many candidates."""
        problem = task.problem
        profile = problem.profile
        longest: int = profile.longest or profile.tokens
        state: int = profile.n * problem.hv * problem.k * problem.v * 4 if problem.state_dtype else 0
        stored = state * (longest + 1) if problem.intermediates != "none" else 0
        each = _PER_CANDIDATE + _PER_TOKEN * longest + _PER_STATE_BYTE * (state + stored)
        race = 0.5 * settings.policy.race.wall_cap_s
        return self.scale * (_PER_PROBLEM + each * candidates) + race


def _probe() -> float:
    """Seconds of a fixed piece of work of the kind the gate spends its time on; the best of a few."""
    x = np.ones((64, 128, 128), np.float32)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        x *= np.float32(0.999)
        best = min(best, time.perf_counter() - began)
    return best
