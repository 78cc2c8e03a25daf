"""How fast the kernel is on a GPU: configs of each cell, in CUDA graphs, medians, cold states."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.describe import describe
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .backend import NumbaCuda
from .cubins import cubin
from .variant import Variant

__all__ = ["Cell", "bench", "cells", "compile_cells"]

#: Sets of states that launches take turns with, so that a launch finds its states where serving does: in memory.
_SETS = 8
_REPLAYS = 15


@dataclass(frozen=True, slots=True)
class Cell:
    """``n`` sequences of ``length`` tokens, K = V = 128, bfloat16 in and out."""

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

    @property
    def bytes(self) -> int:
        """States in and out, q, k, v, o, gates."""
        width = 4 if self.state == "float32" else 2
        states = 2 * self.n * self.hv * 128 * 128 * width
        return states + 2 * self.n * self.length * (2 * 128 * (self.h + self.hv) + 2 * self.hv)

    def spec(self) -> CaseSpec:
        """The cell as a case; its tensors are made on the GPU by ``_calls`` instead."""
        return CaseSpec(
            self.label,
            (self.length,) * self.n,
            h=self.h,
            hv=self.hv,
            k=128,
            v=128,
            state_dtype=self.state,
            state_layout="kv" if self.layout == "kv" else "vk",
            as_layout=True,
        )


def cells(quick: bool = False) -> tuple[Cell, ...]:
    """The table's rows; ``quick``: HV = 32 and float32 states alone."""
    shapes = ((1, 1), (4, 1), (16, 1), (64, 1), (256, 1), (16, 4), (64, 4), (16, 16), (1, 16), (1, 64))
    kinds = ((16, 32, "float32"), (4, 8, "float32"), (16, 32, "bfloat16"), (4, 8, "bfloat16"))
    made = [Cell(n, t, h, hv, state, "vk") for h, hv, state in kinds for n, t in shapes]
    made += [Cell(n, 1, 16, 32, state, "kv") for state in ("float32", "bfloat16") for n in (1, 64, 256)]
    return tuple(c for c in made if not quick or (c.hv == 32 and c.state == "float32"))


def _compile(item: tuple[Variant, int]) -> None:
    cubin(*item)


def compile_cells(arch: int, jobs: int, quick: bool = False) -> int:
    """Compile every config of every cell into the directory of kernels; returns how many kernels that is."""
    backend = NumbaCuda()
    wanted: dict[tuple[Variant, int], None] = {}
    for cell in cells(quick):
        problem = describe(cell.spec(), "cuda", arch)
        for config in backend.configs(problem):
            wanted[Variant.of(problem, config, wide=True), arch] = None
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        for _ in workers.map(_compile, wanted):
            pass
    return len(wanted)


def _calls(cell: Cell) -> list[Call]:
    """The same call on every set of states."""
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    tokens, half = cell.n * cell.length, torch.bfloat16
    pool = torch.empty(cell.n * _SETS, cell.hv, 128, 128, device="cuda", dtype=getattr(torch, cell.state))
    pool.normal_(0, 0.1, generator=g)
    slots = torch.arange(cell.n * _SETS, device="cuda", dtype=torch.int32).view(_SETS, cell.n)
    call = canonical_call(
        torch.log(torch.rand(cell.hv, generator=g, device="cuda") * 2 + 0.01),
        draw(1, tokens, cell.hv).to(half),
        draw(cell.hv) * 0.5,
        1.0,
        20.0,
        draw(1, tokens, cell.h, 128).to(half),
        draw(1, tokens, cell.h, 128).to(half),
        draw(1, tokens, cell.hv, 128).to(half),
        draw(1, tokens, cell.hv).to(half),
        pool,
        slots[0],
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=torch.arange(0, tokens + 1, cell.length, device="cuda", dtype=torch.int32),
        state_layout="kv" if cell.layout == "kv" else "vk",
        max_seqlen=cell.length,
    )
    call.out = torch.empty_like(call.v)
    return [call.replace(read_slots=chosen) for chosen in slots]


def _graph_us(run: Callable[[Call], Any], calls: Sequence[Call]) -> float:
    """Median microseconds per launch of a graph that launches every call twice."""
    for call in calls:
        run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in (*calls, *calls):
            run(call)
    graph.replay()
    return median(_elapsed_us(graph.replay) for _ in range(_REPLAYS)) / (2 * len(calls))


def _elapsed_us(work: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def _eager_us(run: Callable[[Call], Any], call: Call, launches: int = 200) -> float:
    """Host microseconds per call of the bound runner, nothing waited for in between."""

    def once() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(launches):
            run(call)
        return (time.perf_counter() - began) * 1e6 / launches

    return median(once() for _ in range(5))


def _copy_bytes_per_us() -> float:
    """Bytes read and written per microsecond by a large device-to-device copy."""
    x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.numel() / median(_elapsed_us(lambda: y.copy_(x)) for _ in range(7))


def bench(quick: bool = False) -> dict[str, Any]:
    """Time every config of every cell; one row per cell, its configs' times inside."""
    backend = NumbaCuda()
    bandwidth = _copy_bytes_per_us()
    typical = f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e6:.3f} TB/s"
    print(typical)
    rows = [_row(cell, backend, bandwidth) for cell in cells(quick)]
    return {"device": torch.cuda.get_device_name(), "copy_TB_s": round(bandwidth / 1e6, 3), "rows": rows}


def _row(cell: Cell, backend: NumbaCuda, bandwidth: float) -> dict[str, Any]:
    calls = _calls(cell)
    problem: Problem = calls[0].problem("graph")
    offered: Sequence[Config] = backend.configs(problem)
    runs = {config.label: backend.bind(problem, config) for config in offered}
    times = {label: _graph_us(run, calls) for label, run in runs.items()}
    default, best = offered[0].label, min(times, key=lambda label: times[label])
    floor = cell.bytes / bandwidth
    row = {
        "cell": cell.label,
        "floor_us": round(floor, 2),
        "default_us": round(times[default], 2),
        "best_us": round(times[best], 2),
        "of_copy": round(floor / times[best], 3),
        "eager_us": round(_eager_us(runs[default], calls[0]), 2),
        "us_per_token": round(times[best] / cell.length, 3) if cell.n == 1 else None,
        "default": default,
        "best": best,
        "configs": {label: round(us, 2) for label, us in times.items()},
    }
    shown = ("floor_us", "default_us", "best_us", "of_copy", "eager_us", "us_per_token")
    print(f"{cell.label:36}", *(f"{name} {row[name]}" for name in shown), best, flush=True)
    return row
