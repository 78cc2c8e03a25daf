"""How long tuning a problem will take, roughly: a guess for a plan, corrected by what earlier runs took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..backends.launch.cubins import directory
from ..cache.entry import Entry
from .compiling import Compilation, Compilers
from .tuner import Task

__all__ = ["CostModel", "compile_seconds"]


@dataclass(frozen=True, slots=True)
class _Rates:
    """Seconds on one kind of device.

    Attributes:
        problem: loading, round trips, the race. candidate: binding it, its first calls and, of the best, the gate.
        token: of the longest sequence: three references with their bounds go through it step by step.
        state_byte: states are made up and compared several times.
    """

    problem: float
    candidate: float
    token: float
    state_byte: float


_CPU = _Rates(problem=1.0, candidate=0.05, token=45e-3, state_byte=2.2e-7)
_GPU = _Rates(problem=0.8, candidate=25e-3, token=2.5e-3, state_byte=2e-9)

#: Seconds on the machine the CPU's rates are of for a probe to take (see ``_probe``): others are scaled by theirs.
_PROBE_S = 5e-5
#: Seconds of one processor per candidate's kernels; of those that are there, for finding them; for compilers to start.
_COMPILED, _FOUND, _STARTED = 3.3, 0.4, 10.0


@dataclass(frozen=True, slots=True)
class CostModel:
    """Estimates seconds per problem; ``scale`` is this machine's against the model's.

    Attributes: ``scale``; ``source``, where it comes from, in words.
    """

    scale: float
    source: str

    @classmethod
    def calibrated(cls, device: str, earlier: Sequence[tuple[Task, Entry]]) -> CostModel:
        """From earlier entries of the same environment if there are any, else, on a CPU, from a quick measurement."""
        flat = cls(1.0, "")
        ratios = [
            entry.measured["seconds"] / flat.seconds(task, len(entry.candidates))
            for task, entry in earlier
            if entry.measured["seconds"] > 0
        ]
        if ratios:
            return cls(statistics.median(ratios), f"{len(ratios)} earlier entries")
        if device != "cpu":
            return cls(1.0, "an H100's times")
        return cls(max(0.25, _probe() / _PROBE_S), "a quick measurement")

    def seconds(self, task: Task, candidates: int) -> float:
        """Wall seconds to tune ``task`` with so many candidates, whose kernels are compiled."""
        problem = task.problem
        rates = _CPU if problem.device == "cpu" else _GPU
        profile = problem.profile
        longest: int = profile.longest or profile.tokens
        state: int = profile.n * problem.hv * problem.k * problem.v * 4 if problem.state_dtype else 0
        stored = state * (longest + 1) if problem.intermediates != "none" else 0
        each_token = rates.token * longest + rates.state_byte * (state + stored)
        return self.scale * (rates.problem + rates.candidate * candidates + each_token)


def compile_seconds(work: Sequence[Compilation]) -> float:
    """Wall seconds until ``work`` is compiled, on this machine's processors; little if that was done here before."""
    if not work:
        return 0.0
    each = _FOUND if directory().is_dir() and any(directory().iterdir()) else _COMPILED
    return _STARTED + each * len(work) / Compilers().jobs


def _probe() -> float:
    """Seconds of a fixed piece of work of the kind the gate spends its time on; the best of a few."""
    x = np.ones((64, 128, 128), np.float32)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        x *= np.float32(0.999)
        best = min(best, time.perf_counter() - began)
    return best
