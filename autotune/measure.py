"""The bench on a CPU: what one timed sample is there. Runs in the worker only.

A sample is ``launches`` calls in a row, each with its output's allocation, as the op does it; host cost is part of
the time. Every call of a sample names other slots of the pool than the one before, so that states are as cold as
in a model, where other layers ran in between.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from ..errors import ArgumentValueError
from ..registry.backend import Runner
from ..registry.spec import OpSpec
from .policy import MeasurePolicy
from .recipe import ProblemRecipe
from .repeated import repeated_call

__all__ = ["Bandwidth", "Bench", "MeasurePolicy", "cache_bytes", "copies_to_rotate", "once"]

#: Rotated states may take this share of the memory that is free, and no more copies than this are any colder.
_MEMORY_SHARE = 0.25
_MAX_COPIES = 128
_MOSTLY_INPUTS = 4

_SENTINEL_FLOATS = 1 << 20  # 4 MiB: its time is bandwidth and clock, not call overhead
_SENTINEL_RUNS = 7
_MAX_LAUNCHES = 1000

_PIECE_FLOATS = 1 << 18
_MIN_MEASURED = 1 << 22
_SATURATING_THREADS = 4


def cache_bytes() -> int:
    """The last-level cache of this CPU, 32 MiB if it does not say."""
    sizes = [os.sysconf(n) for n in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if n in os.sysconf_names]
    return next((size for size in sizes if size > 0), 32 << 20)


def copies_to_rotate(state_bytes: int, policy: MeasurePolicy, cache: int, available: int, input_bytes: int = 0) -> int:
    """How many calls' ``state_bytes`` make ``rotate_l2`` times ``cache`` bytes, within the memory there is.

    Fewer for calls whose ``input_bytes`` are most of what they move: how cold a state is then matters little, and each
    further set costs a long call per sample.
    """
    if not policy.cold or state_bytes <= 0:
        return 1
    enough = int(policy.rotate_l2 * cache)
    wanted = -(-enough // state_bytes)
    if input_bytes >= _MOSTLY_INPUTS * state_bytes:
        wanted = min(wanted, 1 + enough // (state_bytes + input_bytes))
    possible = int(_MEMORY_SHARE * available) // state_bytes
    return max(1, min(wanted, possible, _MAX_COPIES))


class Bench:
    """Times candidates of one problem on the CPU, ``eager``: wall clock, host cost included.

    Raises: ArgumentValueError, for a launch mode that a CPU does not have.
    """

    def __init__(
        self, spec: OpSpec, recipe: ProblemRecipe, device: str, policy: MeasurePolicy, bandwidth: Bandwidth
    ) -> None:
        if policy.mode != "eager":
            raise ArgumentValueError("mode", "eager on a CPU", policy.mode)
        self.spec = spec
        self.policy = policy
        hooks = importlib.import_module(recipe.hooks)
        states = hooks.state_bytes(recipe.case)
        copies = copies_to_rotate(states, policy, cache_bytes(), psutil.virtual_memory().available)
        inputs = spec.make_inputs(hooks.with_room(recipe.case, copies), recipe.seed, device)
        self._calls: tuple[Any, ...] = hooks.rotated_calls(spec.canonical(**inputs.kwargs), copies)
        self._turn: Iterator[int] = itertools.cycle(range(len(self._calls)))
        self._repeated: dict[str, tuple[Runner, list[Callable[[], None]]]] = {}
        self._moved: int = hooks.bytes_moved(self._calls[0])
        self._best: dict[str, float] = {}
        self._sentinel = (torch.zeros(_SENTINEL_FLOATS), torch.empty(_SENTINEL_FLOATS))
        self._bandwidth = bandwidth
        self._working_set = max(self._moved, states * len(self._calls))

    def facts(self) -> dict[str, Any]:
        """What the tuner must know of this bench: the floor no honest call can be under, and the method in words."""
        method = f"perf_counter_ns, eager, {len(self._calls)} sets of states"
        return {"floor_s": self._moved / self._bandwidth.of(self._working_set), "method": method}

    def floor(self) -> dict[str, Any]:
        """The floor after measuring the bandwidth once more: it can only have come down."""
        return {"floor_s": self._moved / self._bandwidth.again(self._working_set)}

    def block(self, names: Sequence[str], runners: Mapping[str, Runner], at: Callable[[str], None]) -> dict[str, Any]:
        """One sample of each of ``names`` in the given order, and of the sentinel before and after.

        Returns: ``seconds`` per call and ``launches``, by name; ``sentinel_s``; ``wall_s`` of it all.
        """
        began = time.perf_counter_ns()
        seconds: dict[str, float] = {}
        launches: dict[str, int] = {}
        sentinel = self._time_sentinel()
        gc.disable()  # as timeit: a collection inside a sample is nobody's fault
        try:
            for name in names:
                at(name)
                launches[name] = self._launches(name)
                seconds[name] = self._sample(name, runners[name], launches[name])
                self._best[name] = min(seconds[name], self._best.get(name, seconds[name]))
        finally:
            gc.enable()
        sentinel += self._time_sentinel()
        return {
            "seconds": seconds,
            "launches": launches,
            "sentinel_s": statistics.median(sentinel),
            "wall_s": (time.perf_counter_ns() - began) * 1e-9,
        }

    def _launches(self, name: str) -> int:
        best = self._best.get(name)
        return 1 if best is None else min(_MAX_LAUNCHES, self.policy.launches_per_sample(best))

    def _sample(self, name: str, runner: Runner, launches: int) -> float:
        known, runs = self._repeated.get(name, (None, []))
        if known is not runner:  # bound anew
            runs = [repeated_call(self.spec, runner, call) for call in self._calls]
            self._repeated[name] = runner, runs
        # Each sample goes on where the last one ended: no state is warmer than the rotation makes it.
        calls = [runs[next(self._turn)] for _ in range(launches)]
        began = time.perf_counter_ns()
        for call in calls:
            call()
        return max(1, time.perf_counter_ns() - began) * 1e-9 / launches

    def _time_sentinel(self) -> list[float]:
        source, target = self._sentinel
        return [_seconds(lambda: target.copy_(source)) for _ in range(_SENTINEL_RUNS)]


def once(spec: OpSpec, call: Any, runner: Runner) -> float:
    """Seconds of one call on the CPU, its output's allocation included."""

    def whole() -> None:
        call.out = spec.allocate(call)
        runner(call)

    return _seconds(whole)


class Bandwidth:
    """Bytes per second that this machine moves within a working set of a given size, at best.

    The best of a copy and an update in place, whichever the candidate's own mix is like, by all threads together or
    by one times the number of threads (a few at most: memory saturates). A busy machine hardly ever lets all
    threads run at once, but one thread finds its quiet moments, and a floor must not depend on the neighbours.
    """

    def __init__(self) -> None:
        self._best: dict[int, float] = {}

    def of(self, working_set: int) -> float:
        """Measured at the first use of that size only."""
        floats = self._floats(working_set)
        return self._best[floats] if floats in self._best else self.again(working_set)

    def again(self, working_set: int) -> float:
        """Measured anew; a machine that was busy before may show more now."""
        floats = self._floats(working_set)
        x, y = torch.zeros(floats), torch.zeros(floats)
        alone = min(torch.get_num_threads(), _SATURATING_THREADS)
        best = self._best.get(floats, 0.0)
        for _ in range(max(3, _MIN_MEASURED // floats)):
            best = max(best, 8 * floats / min(_seconds(lambda: y.copy_(x)), _seconds(lambda: x.mul_(1.0))))
        # Piece by piece through the whole set, so that each is as cold as the set makes it; the best piece counts.
        size = min(floats, _PIECE_FLOATS)
        for start in range(0, floats - size + 1, size):
            source, target = x.numpy()[start : start + size], y.numpy()[start : start + size]
            for _ in range(1 if floats > size else 10):
                copied = _seconds(partial(np.copyto, target, source))
                updated = _seconds(partial(np.multiply, target, np.float32(1.0), out=target))
                # In a larger set only the copy is cold: the update finds what the copy has just brought in.
                best = max(best, alone * 8 * size / copied, alone * 8 * size / updated if floats == size else 0.0)
        self._best[floats] = best
        return best

    @staticmethod
    def _floats(working_set: int) -> int:
        # Powers of two, so that problems of one size share a measurement; rounded down, to what is the faster side.
        size = max(1 << 16, min(working_set, 4 * cache_bytes()))
        return (1 << (size.bit_length() - 1)) // 8


def _seconds(kernel: Callable[[], Any]) -> float:
    began = time.perf_counter_ns()
    kernel()
    return max(1, time.perf_counter_ns() - began) * 1e-9
