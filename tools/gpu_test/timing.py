"""Timing on the GPU: CUDA graphs raced against one another, eager calls, the copy that floors are made of."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["Replay", "copy_bandwidth", "eager_us", "launches_for", "race"]

Launch = Callable[[Call], Any]

#: Microseconds a replay should last at least, so that neither the events' resolution nor the graph's start matters.
_LONG_ENOUGH = 300.0
#: Launches of the fastest kernel that need so long; more would cost capturing time.
_MOST = 128
#: Cycles that the device is kept busy while the host queues what is timed: thrice what launching a graph takes.
_HEAD_START = 60_000


def launches_for(floor_us: float, sets: int) -> int:
    """How many launches a graph has: whole turns through the sets, at least two."""
    wanted = min(_MOST, _LONG_ENOUGH / max(floor_us, 2.5))
    return sets * max(2, -(-int(wanted) // sets))


def _device_us(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


class Replay:
    """A graph that launches on every call in turn."""

    def __init__(self, launch: Launch, calls: Sequence[Call], launches: int) -> None:
        launch(calls[0])  # what is compiled or loaded lazily
        torch.cuda.synchronize()
        self._launches = launches
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(launches):
                launch(calls[i % len(calls)])
        self._graph.replay()
        torch.cuda.synchronize()

    def microseconds(self) -> float:
        """Per launch, in one replay."""
        return _device_us(self._graph.replay) / self._launches


def race(replays: Mapping[str, Replay], rounds: int) -> dict[str, float]:
    """Median microseconds per launch of each, sampled in turn, in a fresh random order every round."""
    samples: dict[str, list[float]] = {name: [] for name in replays}
    order, shuffle = list(replays), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(replays[name].microseconds())
    return {name: statistics.median(taken) for name, taken in samples.items()}


def eager_us(launch: Launch, calls: Sequence[Call], launches: int = 40, rounds: int = 5) -> float:
    """Microseconds per call launched from the host, until the device is done: the larger of host and device time."""
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for i in range(launches):
            launch(calls[i % len(calls)])
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - began) * 1e6 / launches)
    return statistics.median(taken)


@cache
def copy_bandwidth() -> float:
    """Bytes per microsecond, reads and writes counted, of a copy far larger than any cache; measured once."""
    x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    y.copy_(x)
    taken = statistics.median(_device_us(lambda: y.copy_(x)) for _ in range(9))
    return 2 * x.numel() / taken
