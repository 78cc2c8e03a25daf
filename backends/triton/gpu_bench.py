"""How fast the kernel is on a GPU: every config of every cell, interleaved, in CUDA graphs, states cold."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ...errors import BackendFailedError
from ...registry.backend import Config, Runner
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .backend import Triton

__all__ = ["CELLS", "Cell", "bench_all"]

#: Sets of slots a launch rotates over, so that it finds its states where serving does: in memory.
_SETS = 8
_SAMPLES = 9
#: Launches in a graph, at least, and microseconds it should last, so that the events' resolution does not matter.
_LAUNCHES, _LONG_ENOUGH = 16, 400.0
_DIM = 128


@dataclass(frozen=True, slots=True)
class Cell:
    """``n`` sequences of ``length`` tokens on ``h`` and ``hv`` heads of 128."""

    n: int
    length: int
    h: int
    hv: int
    state: str
    layout: str

    @property
    def label(self) -> str:
        what = f"decode N={self.n}" if self.length == 1 else f"{self.n}x{self.length}"
        return f"{what} H={self.h} HV={self.hv} {self.state} {self.layout}"

    def least_bytes(self) -> int:
        """States read and written, q, k, v, o, a and b."""
        tokens = self.n * self.length
        states = 2 * self.n * self.hv * _DIM * _DIM * (4 if self.state == "float32" else 2)
        return states + 2 * tokens * (2 * self.h * _DIM + 2 * self.hv * _DIM + 2 * self.hv)


def _cells() -> tuple[Cell, ...]:
    shapes = ((1, 1), (4, 1), (16, 1), (64, 1), (256, 1), (16, 4), (64, 4), (16, 16), (1, 16), (1, 64))
    heads = ((16, 32), (4, 8))
    made = [
        Cell(n, length, h, hv, state, "vk")
        for (h, hv), state, (n, length) in product(heads, ("float32", "bfloat16"), shapes)
    ]
    made += [Cell(n, length, h, hv, "float32", "kv") for (h, hv), (n, length) in product(heads, shapes)]
    return tuple(made)


CELLS = _cells()


def _calls(cell: Cell, sets: int) -> list[Call]:
    """One call per set of slots, all of one pool. Made on the GPU: the largest pool is 4 GB."""
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    tokens, half = cell.n * cell.length, torch.bfloat16
    pool = torch.empty(cell.n * sets, cell.hv, _DIM, _DIM, device="cuda", dtype=getattr(torch, cell.state))
    pool.normal_(0, 0.1, generator=g)
    slots = torch.arange(cell.n * sets, device="cuda", dtype=torch.int32).view(sets, cell.n)
    first = canonical_call(
        torch.log(torch.rand(cell.hv, generator=g, device="cuda") * 2 + 0.01),
        draw(1, tokens, cell.hv).to(half),
        draw(cell.hv) * 0.5,
        1.0,
        20.0,
        draw(1, tokens, cell.h, _DIM).to(half),
        draw(1, tokens, cell.h, _DIM).to(half),
        draw(1, tokens, cell.hv, _DIM).to(half),
        draw(1, tokens, cell.hv).to(half),
        pool,
        slots[0],
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=torch.arange(0, tokens + 1, cell.length, device="cuda", dtype=torch.int32),
        state_layout=cell.layout,
        max_seqlen=cell.length,
    )
    first.out = torch.empty_like(first.v)
    return [first.replace(read_slots=row) for row in slots]


def _compile(job: tuple[Cell, dict[str, Any]]) -> str:
    """In a process of its own: launch once, so that the kernel lies in Triton's cache. Returns what went wrong."""
    cell, settings = job
    (call,) = _calls(Cell(1, cell.length, cell.h, cell.hv, cell.state, cell.layout), 1)
    config = Config.from_dict(settings)
    try:
        Triton().bind(call.problem("graph"), config)(call)
        torch.cuda.synchronize()
    except BackendFailedError as error:
        return f"{cell.label} [{config.label}]: {error}"
    return ""


def _milliseconds(work: Callable[[], object]) -> float:
    """Device time of what ``work`` launches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


class _Replay:
    """A graph that launches a runner on every call, several times over."""

    def __init__(self, run: Runner, calls: list[Call]) -> None:
        for call in calls:
            run(call)
        torch.cuda.synchronize()
        self._capture(run, calls, max(1, _LAUNCHES // len(calls)))
        if (estimate := self.microseconds() * self.launches) < _LONG_ENOUGH:
            self._capture(run, calls, max(1, int(_LONG_ENOUGH / estimate) * self.launches // len(calls)))

    def _capture(self, run: Runner, calls: list[Call], rounds: int) -> None:
        self.launches = rounds * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(rounds):
                for call in calls:
                    run(call)
        self.graph.replay()
        torch.cuda.synchronize()

    def microseconds(self) -> float:
        """Per launch, of one replay."""
        return _milliseconds(self.graph.replay) * 1e3 / self.launches


def _race(runs: dict[str, Runner], calls: list[Call]) -> dict[str, float]:
    """Median microseconds per launch of each, sampled in turns of a fresh random order."""
    replays = {label: _Replay(run, calls) for label, run in runs.items()}
    samples: dict[str, list[float]] = {label: [] for label in replays}
    order, shuffle = list(replays), random.Random(0)
    for _ in range(_SAMPLES):
        shuffle.shuffle(order)
        for label in order:
            samples[label].append(replays[label].microseconds())
    return {label: statistics.median(values) for label, values in samples.items()}


def _eager(run: Runner, call: Call, launches: int = 200) -> float:
    """Host microseconds per call of the bound runner, nothing waited for in between."""
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(launches):
            run(call)
        rounds.append((time.perf_counter() - began) * 1e6 / launches)
    torch.cuda.synchronize()
    return statistics.median(rounds)


def _copy_bandwidth() -> float:
    """Bytes per second, reads and writes, of a copy far larger than any cache."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    taken = statistics.median(_milliseconds(lambda: y.copy_(x)) for _ in range(9))
    return 2 * x.numel() / taken * 1e3


def bench_all(jobs: int, quick: bool) -> dict[str, Any]:
    """Every config of every cell. Prints a line per cell; returns the report."""
    backend = Triton()
    chosen = [c for c in CELLS if not quick or (c.hv == 32 and c.state == "float32")]
    offered = {cell: backend.configs(_calls(cell, 1)[0].problem("graph")) for cell in chosen}
    work = {
        (cell.length == 1, cell.hv, cell.state, cell.layout, config): (cell, config.to_dict())
        for cell in chosen
        for config in offered[cell]
    }
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [message for message in pool.map(_compile, work.values()) if message]
    bandwidth = _copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.3f} TB/s", *failed, sep="\n", flush=True)
    rows = []
    for cell in chosen:
        calls = _calls(cell, _SETS)
        problem = calls[0].problem("graph")
        runs = {config.label: backend.bind(problem, config) for config in offered[cell]}
        times = _race(runs, calls)
        default, best = next(iter(runs)), min(times, key=lambda label: times[label])
        floor = cell.least_bytes() / bandwidth * 1e6
        rows.append(
            {
                "cell": cell.label,
                "floor_us": round(floor, 2),
                "default_us": round(times[default], 2),
                "best_us": round(times[best], 2),
                "default": default,
                "best": best,
                "us_per_token": round(times[best] / cell.length, 3),
                "of_copy": round(floor / times[best], 3),
                "eager_us": round(_eager(runs[default], calls[0]), 1),
                "configs": {label: round(us, 2) for label, us in times.items()},
            }
        )
        shown = ("floor_us", "default_us", "best_us", "of_copy", "eager_us")
        print(f"{cell.label:40}", *(f"{name} {rows[-1][name]}" for name in shown), best, flush=True)
        del calls, runs
        torch.cuda.empty_cache()
    return {
        "device": torch.cuda.get_device_name(),
        "copy_TB_s": round(bandwidth / 1e12, 3),
        "failed": failed,
        "rows": rows,
    }
