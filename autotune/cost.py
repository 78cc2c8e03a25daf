"""How long a warm-up will take, roughly: a guess for a plan, corrected by what earlier runs took."""

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

__all__ = ["CostModel", "compile_seconds", "start_seconds", "warmup_seconds"]


@dataclass(frozen=True, slots=True)
class _Rates:
    """Seconds on one kind of device.

    Attributes:
        problem: loading, round trips, the race. candidate: binding it, its first calls and, of the best, the gate.
        place: of each candidate and each of the sequences' places, were all as long as the longest: first calls of
            candidates that pad.
        token: of the longest sequence: three references with their bounds go through it step by step.
        state_byte: states are made up and compared several times.
    """

    problem: float
    candidate: float
    place: float
    token: float
    state_byte: float


_CPU = _Rates(problem=0.01, candidate=0.0106, place=3.5e-6, token=2.2e-3, state_byte=5.6e-9)
#: Of the candidates of a problem that was tuned by graph before, so many are called.
_CALLED_AGAIN = 1 / 3
#: Eager launches are timed for longer, and by the host. ``token`` is a sixth of what was measured before references
#: took a sixth of the operations; the rest was measured.
_GPU = {
    "graph": _Rates(problem=0.9, candidate=18e-3, place=0.0, token=0.75e-3, state_byte=2e-9),
    "eager": _Rates(problem=1.6, candidate=20e-3, place=0.0, token=0.75e-3, state_byte=2e-9),
}

#: Seconds on the machine the CPU's rates are of for a probe to take (see ``_probe``): others are scaled by theirs.
_PROBE_S = 5e-5
#: Seconds of one processor per candidate's kernels; of those that are there, for finding them; for compilers to start.
#: With these a warm-up of 46 problems on a slow host would have been promised in about 200 s; it took 268.
_COMPILED, _FOUND, _STARTED = 4.2, 0.4, 6.0
#: Seconds until a worker has loaded its libraries; on a GPU also until it has been through a gate once.
_LOADED = {"cpu": 3.0, "cuda": 16.0}
#: Seconds of the proof: in all, and per problem.
_PROOF, _PROVEN = 1.5, 0.12


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

    def seconds(self, task: Task, candidates: int, proven: bool = False) -> float:
        """Wall seconds to tune ``task`` with so many candidates, whose kernels are compiled.

        Args:
            proven: its candidates were in another launch mode before: what references say of them is known.
        """
        problem = task.problem
        rates = _CPU if problem.device == "cpu" else _GPU[task.recipe.mode]
        profile = problem.profile
        n: int = profile.n
        longest: int = profile.longest or profile.tokens
        state: int = n * problem.hv * problem.k * problem.v * 4 if problem.state_dtype else 0
        stored = state * (longest + 1) if problem.intermediates != "none" else 0
        each_token = rates.token * longest + rates.state_byte * (state + stored)
        each_candidate = rates.candidate * (_CALLED_AGAIN if proven else 1.0) + rates.place * n * longest
        return self.scale * (rates.problem + each_candidate * candidates + (0.0 if proven else each_token))


def start_seconds(device: str) -> float:
    """Wall seconds until workers on a ``device`` of this kind are ready; kernels are compiled at the same time."""
    return _LOADED[device]


def compile_seconds(work: Sequence[Compilation]) -> float:
    """Wall seconds until ``work`` is compiled, on this machine's processors; little of what was done here before."""
    if not work:
        return 0.0
    # Whose they are they do not say. An earlier warm-up for another shard leaves those that this one needs.
    there = min(len(work), sum(1 for _ in directory().glob("*/*.json")))
    return _STARTED + (_FOUND * there + _COMPILED * (len(work) - there)) / Compilers().jobs


def warmup_seconds(graph: Sequence[float], others: Sequence[float], start_s: float, compile_s: float) -> float:
    """Wall seconds of a whole warm-up on one device.

    Args:
        graph: of each problem that is launched by graph; those are tuned while kernels of others are compiled.
        others: of each other problem. start_s, compile_s: see :func:`start_seconds`, :func:`compile_seconds`.
    """
    if not (graph or others):
        return 0.0
    first = max(start_s + sum(graph), compile_s + max(graph, default=0.0))
    return first + sum(others) + _PROOF + _PROVEN * (len(graph) + len(others))


def _probe() -> float:
    """Seconds of a fixed piece of work of the kind the gate spends its time on; the best of a few."""
    x = np.ones((64, 128, 128), np.float32)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        x *= np.float32(0.999)
        best = min(best, time.perf_counter() - began)
    return best
