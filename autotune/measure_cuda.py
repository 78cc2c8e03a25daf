"""The bench on a GPU: what one timed sample is there. Runs in the worker only.

``graph``: device time of a captured CUDA graph of ``launches`` calls, between two events, over the number of calls.
``eager``: wall clock of ``launches`` calls, each with its output's allocation, until the device is done, over their
number: the larger of host and device time, as a program that never waits sees it. In both, consecutive calls name
different slots of the pool, and together more bytes than the level-2 cache holds, so that states come from memory as
in a model, where other layers ran in between; a problem without states has the cache written over instead.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..registry.backend import Runner
from ..registry.spec import OpSpec
from .measure import copies_to_rotate
from .policy import MeasurePolicy
from .recipe import ProblemRecipe
from .repeated import repeated_call

__all__ = ["CudaBandwidth", "CudaBench", "captured", "once", "peak_bandwidth"]

#: Bytes the sentinel copies: more than any level-2 cache, so that its time is the memory's clock.
_SENTINEL_BYTES = 128 << 20
_SENTINEL_RUNS = 5
#: Calls in one captured graph at most; capture and instantiation cost some 5 us a node.
_MAX_LAUNCHES = 512
#: One eager sample: launches enough that waiting for the device once at its end does not matter, in bounded time. Of
#: calls that take longer than a tenth of a millisecond fewer do: with 10 ms a race of long prompts took up to nine s.
_EAGER_LAUNCHES = 40
_EAGER_SAMPLE_S = 4e-3
_LARGEST_COPY = 1 << 30
#: Samples to rank by, and seconds of them after which no further one is taken.
_GLANCES = 3
_GLANCES_S = 10e-3
#: Cycles the device is kept busy while the host queues what is timed: some 30 us, thrice what a graph launch takes.
_HEAD_START_CYCLES = 60_000
#: ``CUdevice_attribute``: kHz of the memory's clock, bits of its bus. Two bits a line and clock.
_MEMORY_CLOCK, _BUS_WIDTH = 36, 37
_PER_CLOCK = 2


@dataclass(slots=True)
class _Captured:
    """A graph of one candidate's calls, and how many there are."""

    graph: torch.cuda.CUDAGraph
    launches: int


def once(spec: OpSpec, call: Any, runner: Runner) -> float:
    """Seconds of one call, its output's allocation included, until the device is done."""
    torch.cuda.synchronize()
    began = time.perf_counter_ns()
    call.out = spec.allocate(call)
    runner(call)
    torch.cuda.synchronize()
    return max(1, time.perf_counter_ns() - began) * 1e-9


class CudaBench:
    """Times candidates of one problem on the current CUDA device, in the launch mode of ``policy``."""

    def __init__(
        self, spec: OpSpec, recipe: ProblemRecipe, device: str, policy: MeasurePolicy, bandwidth: CudaBandwidth
    ) -> None:
        self.spec = spec
        self.policy = policy
        hooks = importlib.import_module(recipe.hooks)
        states = hooks.state_bytes(recipe.case)
        self._cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        free, _ = torch.cuda.mem_get_info(device)
        copies = copies_to_rotate(states, policy, self._cache_bytes, free, hooks.input_bytes(recipe.case))
        inputs = spec.make_inputs(hooks.with_room(recipe.case, copies), recipe.seed, device)
        self._calls: tuple[Any, ...] = hooks.rotated_calls(spec.canonical(**inputs.kwargs), copies)
        for call in self._calls:
            call.out = spec.allocate(call)
        self._moved: int = hooks.bytes_moved(self._calls[0])
        self._best: dict[str, float] = {}
        self._captured: dict[str, _Captured] = {}
        self._repeated: dict[str, list[Callable[[], None]]] = {}
        self._sentinel = tuple(torch.empty(_SENTINEL_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
        # States that are rotated are cold already; only what is not rotated has to be driven out.
        flush = int(policy.flush_l2 * self._cache_bytes) if policy.cold and len(self._calls) == 1 else 0
        self._flush = torch.empty(flush, dtype=torch.uint8, device=device)
        self._bandwidth = bandwidth
        self._working_set = max(self._moved, states * len(self._calls))

    def facts(self) -> dict[str, Any]:
        """What the tuner must know of this bench: the floor no honest call can be under, and the method in words."""
        timer = "CUDA events around a graph" if self.policy.mode == "graph" else "perf_counter_ns to idle device, eager"
        return {
            "floor_s": self._moved / self._bandwidth.of(self._working_set),
            "method": f"{timer}, {len(self._calls)} sets of states",
        }

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
        sample = self._graph_sample if self.policy.mode == "graph" else self._eager_sample
        sentinel = self._time_sentinel()
        gc.disable()
        try:
            for name in names:
                at(name)
                seconds[name], launches[name] = sample(name, runners[name])
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

    @property
    def rotates(self) -> bool:
        """Whether states are as cold in one call after another as in a graph of them."""
        return len(self._calls) > 1

    def glance(self, name: str, runner: Runner, waited_s: float) -> float:
        """Seconds per call, at best of a few samples: to rank by, not to judge by. One long sample is enough.

        Args:
            waited_s: what one call took, waiting for it included.
        """
        sample = self._graph_sample if self.policy.mode == "graph" else self._eager_sample
        self._best[name] = waited_s
        seconds: list[float] = []
        spent = 0.0
        while len(seconds) < _GLANCES and spent < _GLANCES_S:
            taken, launches = sample(name, runner)
            seconds.append(taken)
            spent += taken * launches
        return min(seconds)

    def forget(self, name: str) -> None:
        """Drop what was prepared for ``name``."""
        for prepared in (self._captured, self._repeated, self._best):
            prepared.pop(name, None)

    # ---- graph

    def _graph_sample(self, name: str, runner: Runner) -> tuple[float, int]:
        captured = self._captured.get(name)
        wanted = self._wanted(name)
        if captured is None or captured.launches < wanted:
            captured = self._captured[name] = self._capture(runner, wanted)
            captured.graph.replay()  # uploads the graph: the first replay is slower than all others
        self._flush.zero_()
        return _between_events(captured.graph.replay) / captured.launches, captured.launches

    def _wanted(self, name: str) -> int:
        """Launches per graph: whole turns of the rotation, so that no replay finds what the last one left behind."""
        turn = len(self._calls)
        best = self._best.get(name)
        enough = 1 if best is None else min(_MAX_LAUNCHES, self.policy.launches_per_sample(best))
        return turn * -(-enough // turn)

    def _capture(self, runner: Runner, launches: int) -> _Captured:
        for call in self._calls[:2]:  # what compiles or loads at a first call does so before capture
            runner(call)

        def all_of_them() -> None:
            for i in range(launches):
                runner(self._calls[i % len(self._calls)])

        return _Captured(captured(all_of_them), launches)

    # ---- eager

    def _eager_sample(self, name: str, runner: Runner) -> tuple[float, int]:
        best = self._best.get(name)
        launches = _EAGER_LAUNCHES if best is None else max(4, min(_EAGER_LAUNCHES, int(_EAGER_SAMPLE_S / best)))
        runs = self._repeated.get(name)
        if runs is None:
            runs = self._repeated[name] = [repeated_call(self.spec, runner, call) for call in self._calls]
        turn = len(runs)
        self._flush.zero_()
        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        for i in range(launches):
            runs[i % turn]()
        torch.cuda.synchronize()
        return max(1, time.perf_counter_ns() - began) * 1e-9 / launches, launches

    def _time_sentinel(self) -> list[float]:
        source, target = self._sentinel
        return [_between_events(lambda: target.copy_(source)) for _ in range(_SENTINEL_RUNS)]


class CudaBandwidth:
    """Bytes per second, read and written, that nothing within a working set of a given size can exceed.

    The larger of what a copy of that size reached (a small set lies in the level-2 cache) and what the memory's clock
    and width allow: the copy alone says too little where the device is busy, or where copying is not what it does best.
    """

    def __init__(self) -> None:
        self._best: dict[int, float] = {}

    def of(self, working_set: int) -> float:
        """Measured at the first use of that size only."""
        size = self._size(working_set)
        return self._best[size] if size in self._best else self.again(working_set)

    def again(self, working_set: int) -> float:
        """Measured anew; a device that was busy before may show more now."""
        size = self._size(working_set)
        self._best[size] = max(self._best.get(size, 0.0), self._peak(), self._copied(size))
        return self._best[size]

    def _peak(self) -> float:
        from ..backends.launch.driver import gpu

        return peak_bandwidth(gpu().library, torch.cuda.current_device())

    def _copied(self, size: int) -> float:
        source, target = (torch.empty(size // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
        copies = max(4, (64 << 20) // size)

        def copy() -> None:
            for _ in range(copies):
                target.copy_(source)

        copy()
        graph = captured(copy)  # in a graph: the host's pace is no part of a bandwidth
        graph.replay()
        fastest = min(_between_events(graph.replay) for _ in range(5))
        return size * copies / fastest

    @staticmethod
    def _size(working_set: int) -> int:
        # Powers of two, so that problems of one size share a measurement; rounded down, to what is the faster side.
        return 1 << (max(1 << 20, min(working_set, _LARGEST_COPY)).bit_length() - 1)


def peak_bandwidth(library: Any, device: int) -> float:
    """Bytes per second of a device's memory, by its clock and width; 0.0 if the driver (``libcuda``) does not say."""
    told = []
    for attribute in (_MEMORY_CLOCK, _BUS_WIDTH):
        value = ctypes.c_int()
        failed = library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        told.append(0 if failed else max(0, value.value))
    kilohertz, bits = told
    return _PER_CLOCK * kilohertz * 1e3 * bits / 8


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what ``work`` launches on the current stream.

    ``torch.cuda.graph`` would collect garbage and give cached memory back before every capture: a tenth of a second.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph


def _between_events(work: Callable[[], object]) -> float:
    """Device seconds between two events around ``work``, all of it queued before the device reaches the first."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return max(1e-9, float(begin.elapsed_time(end)) * 1e-3)
