"""How fast is the kernel on a GPU: every config of every cell, in CUDA graphs, medians, cold states."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .backend import Cupy

__all__ = ["Cell", "bench", "cells"]

#: State sets a decode benchmark rotates over, so that a launch finds its states where serving does: in memory.
_SETS = 8
_REPLAYS = 15


@dataclass(frozen=True, slots=True)
class Cell:
    """One benchmark: ``n`` sequences of ``length`` tokens; ``sets`` of states to rotate over (1: found in L2)."""

    n: int
    length: int
    h: int
    hv: int
    state: str
    layout: str
    sets: int

    @property
    def label(self) -> str:
        what = f"decode N={self.n}" if self.length == 1 else f"{self.n}x{self.length}"
        return f"{what} H={self.h} HV={self.hv} {self.state} {self.layout}{'' if self.sets > 1 else ' warm'}"

    def bytes(self) -> int:
        """State in and out, q, k, v, o, and gates."""
        width = 4 if self.state == "float32" else 2
        tokens = self.n * self.length
        return 2 * self.n * self.hv * 128 * 128 * width + 2 * tokens * (
            2 * self.h * 128 + 2 * self.hv * 128 + 2 * self.hv
        )


def cells(quick: bool = False) -> tuple[Cell, ...]:
    """The table's rows."""
    shapes = [(1, 1), (4, 1), (16, 1), (64, 1), (256, 1), (16, 4), (64, 4), (16, 16), (1, 16), (1, 64)]
    made = []
    for (h, hv), state in (((16, 32), "float32"), ((4, 8), "float32"), ((16, 32), "bfloat16"), ((4, 8), "bfloat16")):
        for n, length in shapes:
            made.append(Cell(n, length, h, hv, state, "vk", _SETS))
            if length > 1:
                made.append(Cell(n, length, h, hv, state, "vk", 1))
    made += [Cell(n, 1, 16, 32, state, "kv", _SETS) for n in (1, 64, 256) for state in ("float32", "bfloat16")]
    return tuple(c for c in made if not quick or (c.hv == 32 and c.state == "float32"))


def _cell_call(cell: Cell) -> tuple[Call, list[torch.Tensor]]:
    """The call, and its slots for every set of states. Made on the GPU: large pools would take long on the host."""
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    tokens = cell.n * cell.length
    pool = torch.empty(cell.n * cell.sets, cell.hv, 128, 128, device="cuda", dtype=getattr(torch, cell.state))
    pool.normal_(0, 0.1, generator=g)
    half = torch.bfloat16
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
        torch.arange(cell.n, device="cuda", dtype=torch.int32),
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=torch.arange(0, tokens + 1, cell.length, device="cuda", dtype=torch.int32),
        state_layout=cell.layout,
        max_seqlen=cell.length,
    )
    call.out = torch.empty_like(call.v)
    slots = [torch.arange(cell.n, device="cuda", dtype=torch.int32) + s * cell.n for s in range(cell.sets)]
    return call, slots


def _graph_us(run: Callable[[Call], Any], calls: list[Call]) -> float:
    """Median microseconds per launch of a graph that launches every call once."""
    for call in calls:
        run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 16 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                run(call)
    graph.replay()
    times = [_device_seconds(graph.replay) for _ in range(_REPLAYS)]
    return sorted(times)[_REPLAYS // 2] * 1e6 / (rounds * len(calls))


def _device_seconds(work: Callable[[], object]) -> float:
    """Between two events around ``work``."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def _eager_us(run: Callable[[Call], Any], call: Call, launches: int = 200) -> float:
    """Host microseconds per call of the bound runner, nothing waited for in between; median of five."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(launches):
            run(call)
        times.append((time.perf_counter() - began) * 1e6 / launches)
        torch.cuda.synchronize()
    return sorted(times)[2]


def _copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large device-to-device copy."""
    x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    y.copy_(x)
    times = sorted(_device_seconds(lambda: y.copy_(x)) for _ in range(7))
    return 2 * x.numel() / times[3]


def bench(quick: bool = False) -> dict[str, Any]:
    """Every config of every cell; returns a report with one row per cell, its configs' times inside."""
    backend = Cupy()
    bandwidth = _copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.3f} TB/s")
    rows = []
    for cell in cells(quick):
        call, slots = _cell_call(cell)
        calls = [call.replace(read_slots=s) for s in slots]
        problem = call.problem("graph")
        offered = backend.configs(problem)
        with ThreadPoolExecutor(16) as pool:  # NVRTC compiles outside the interpreter's lock
            runs = list(pool.map(lambda config, problem=problem: backend.bind(problem, config), offered))
        times = {config.label: _graph_us(run, calls) for config, run in zip(offered, runs, strict=True)}
        best = min(times, key=lambda label: times[label])
        floor = cell.bytes() / bandwidth * 1e6
        row = {
            "cell": cell.label,
            "floor_us": round(floor, 2),
            "default_us": round(times[offered[0].label], 2),
            "best_us": round(times[best], 2),
            "best": best,
            "default": offered[0].label,
            "us_per_token": round(times[best] / cell.length, 3) if cell.n == 1 else None,
            "of_copy": round(floor / times[best], 3),
            "eager_us": round(_eager_us(runs[0], call), 2),
            "configs": {label: round(us, 2) for label, us in times.items()},
        }
        rows.append(row)
        short = ("floor_us", "default_us", "best_us", "of_copy", "eager_us", "us_per_token")
        print(f"{cell.label:38}", *(f"{name} {row[name]}" for name in short), best, flush=True)
        del call, calls, slots
        torch.cuda.empty_cache()
    return {"device": torch.cuda.get_device_name(), "copy_TB_s": round(bandwidth / 1e12, 3), "rows": rows}
