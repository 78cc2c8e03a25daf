"""What bandwidth Triton reaches on states at given slots: kernels that read each state, scale it and write it back.

    python benchmarks/triton_copies.py [--n 256] [--hv 8] [--dtype bfloat16] [--out FILE]
    TRITON_INTERPRET=1 python benchmarks/triton_copies.py --check       # without a GPU: whether they copy rightly

A decode step that computed nothing. What none of these kernels reaches, no decode kernel of such loads and stores will.
Three ways to bring a tile of states: plain loads and stores of pieces along K, with the caches' hints; programs that
stay and keep the loads of the next tiles in flight in shared memory; and bulk copies by tensor descriptors. Slots
change from call to call over a pool that the second level of cache does not hold; medians of replayed CUDA graphs, in
random order.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
import typer
from record import meta
from rich.console import Console
from rich.table import Table

K = V = 128
#: Calls in a graph, each on slots of its own; rounds, in each of which every kernel's graph is replayed once.
CALLS, ROUNDS = 16, 30


@triton.jit
def pieces(
    pool, slots, scale, HV: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, FIRST: tl.constexpr,
    LOAD: tl.constexpr, STORE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS rows per program, in pieces of SPAN keys. FIRST: leaves the cache first."""
    block = tl.program_id(0)
    tiles: tl.constexpr = V // ROWS
    slot = tl.load(slots + block // (tiles * HV)).to(tl.int64)
    at = pool + (slot * HV + block // tiles % HV) * (V * K) + block % tiles * ROWS * K
    rows = at + tl.arange(0, ROWS)[:, None] * K + tl.arange(0, SPAN)[None, :]
    for piece in tl.static_range(K // SPAN):
        here = rows + piece * SPAN
        state = tl.load(here, cache_modifier=LOAD, eviction_policy=FIRST).to(tl.float32)
        tl.store(here, (state * scale).to(pool.dtype.element_ty), cache_modifier=STORE, eviction_policy=FIRST)


@triton.jit
def stays(
    pool, slots, scale, tiles_of_all, HV: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """Programs that walk over tiles of whole rows, with the loads of STAGES tiles in flight."""
    tiles: tl.constexpr = V // ROWS
    tile = tl.arange(0, ROWS)[:, None] * K + tl.arange(0, K)[None, :]
    for block in tl.range(tl.program_id(0), tiles_of_all, tl.num_programs(0), num_stages=STAGES):
        slot = tl.load(slots + block // (tiles * HV)).to(tl.int64)
        here = pool + (slot * HV + block // tiles % HV) * (V * K) + block % tiles * ROWS * K + tile
        state = tl.load(here).to(tl.float32)
        tl.store(here, (state * scale).to(pool.dtype.element_ty))


@triton.jit
def bulk(
    pool, slots, scale, rows_of_all, tiles_of_all, HV: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The same by bulk copies of ROWS rows: the pool is a matrix of rows of K."""
    tiles: tl.constexpr = V // ROWS
    states = tl.make_tensor_descriptor(pool, shape=[rows_of_all, K], strides=[K, 1], block_shape=[ROWS, K])
    for block in tl.range(tl.program_id(0), tiles_of_all, tl.num_programs(0), num_stages=STAGES):
        slot = tl.load(slots + block // (tiles * HV))
        row = (slot * HV + block // tiles % HV) * V + block % tiles * ROWS
        state = states.load([row, 0]).to(tl.float32)
        states.store([row, 0], (state * scale).to(pool.dtype.element_ty))


@dataclass(frozen=True)
class Copy:
    """A kernel and its settings. ``programs``: of the kernels that stay, per multiprocessor."""

    kernel: Any
    rows: int
    warps: int
    span: int = K
    first: str = ""
    load: str = ""
    store: str = ""
    stages: int = 1
    programs: int = 0

    @property
    def name(self) -> str:
        words = [f"{self.kernel.__name__}", f"rows={self.rows}", f"warps={self.warps}"]
        if self.programs:
            words += [f"stages={self.stages}", f"programs={self.programs}"]
        else:
            words += [f"span={self.span}", *(w for w in (self.first, self.load and "load" + self.load) if w)]
            words += ["store" + self.store] if self.store else []
        return " ".join(words)

    def launch(self, pool: torch.Tensor, slots: torch.Tensor, scale: float, multiprocessors: int) -> None:
        hv, tiles = pool.shape[1], slots.numel() * pool.shape[1] * (V // self.rows)
        common = {"HV": hv, "ROWS": self.rows, "K": K, "V": V, "num_warps": self.warps}
        if not self.programs:
            hints = {"SPAN": self.span, "FIRST": self.first, "LOAD": self.load, "STORE": self.store}
            self.kernel[(tiles,)](pool, slots, scale, **hints, **common)
            return
        grid = (min(tiles, self.programs * multiprocessors),)
        sizes = (pool.shape[0] * hv * V,) if self.kernel is bulk else ()
        self.kernel[grid](pool, slots, scale, *sizes, tiles, STAGES=self.stages, **common)


COPIES: tuple[Copy, ...] = (
    *(Copy(pieces, rows, warps, span) for span in (32, 64) for rows, warps in ((32, 2), (64, 4))),
    *(Copy(pieces, rows, 1) for rows in (8, 16, 32)),
    *(Copy(pieces, rows, 2) for rows in (16, 32, 64)),
    *(Copy(pieces, 16, 1, first=first) for first in ("evict_first", "evict_last")),
    *(Copy(pieces, 16, 1, load=load, store=store) for load, store in ((".cg", ".cg"), (".cg", ".cs"), ("", ".cs"))),
    Copy(pieces, 32, 2, load=".cg", store=".cs"),
    *(Copy(stays, 32, warps, stages=stages, programs=8) for warps in (1, 4) for stages in (2, 4)),
    *(
        Copy(bulk, rows, 4, stages=stages, programs=each)
        for rows, each in ((32, 6), (64, 4), (128, 2))
        for stages in (2, 3, 4)
    ),
    *(Copy(bulk, rows, warps, stages=1, programs=16) for rows, warps in ((32, 1), (64, 2))),
)  # fmt: skip


def scratch(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    """Where Triton puts the descriptors that programs make."""
    return torch.empty(size, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")


def wrong(copy: Copy, hv: int, dtype: torch.dtype, device: str) -> str:
    """What a kernel does to other states than those at the slots, or to these otherwise than it should; "" if right."""
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(9, hv, V, K, generator=draw).to(dtype).to(device)
    slots = torch.tensor([7, 0, 4], dtype=torch.int32, device=device)
    pool = before.clone()
    copy.launch(pool, slots, 0.5, 2)
    expected = before.clone()
    expected[slots.long()] = (before[slots.long()].float() * 0.5).to(dtype)
    return "" if torch.equal(pool, expected) else f"{int((pool != expected).sum())} elements are wrong"


def graph_of(call: Callable[[int], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    call(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(number)
    return graph


def times(calls: dict[str, Callable[[int], None]], seed: int = 0) -> dict[str, float]:
    """Microseconds per call of each, medians."""
    graphs = {name: graph_of(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    order, draw = list(graphs), random.Random(seed)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(ROUNDS):
        draw.shuffle(order)
        for name in order:
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            samples[name].append(1e3 * start.elapsed_time(end) / CALLS)
    return {name: statistics.median(found) for name, found in samples.items()}


def chosen(names: Sequence[str]) -> list[Copy]:
    return [copy for copy in COPIES if not names or any(name in copy.name for name in names)]


def main(
    n: Annotated[int, typer.Option(help="sequences")] = 256,
    hv: Annotated[int, typer.Option(help="value heads")] = 8,
    dtype: Annotated[str, typer.Option(help="of the states: bfloat16, float16 or float32")] = "bfloat16",
    only: Annotated[list[str] | None, typer.Option(help="kernels whose name contains this; repeatable")] = None,
    check: Annotated[bool, typer.Option("--check", help="time nothing")] = False,
    out: Annotated[Path | None, typer.Option(help="write the results here, as JSON")] = None,
) -> None:
    """Check all, time those that are right, print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    triton.set_allocator(scratch)
    console, right, refused = Console(width=120), [], {}
    for copy in chosen(only or []):
        try:
            refused[copy.name] = wrong(copy, 2, kind, device)
        except triton.runtime.errors.OutOfResources as error:
            refused[copy.name] = str(error)
        if not refused[copy.name]:
            right.append(copy)
    for name, why in refused.items():
        if why:
            console.print(f"{name}: {why}", style="red", markup=False)
    console.print(f"{len(right)} of {len(refused)} kernels copy rightly")
    if check:
        raise typer.Exit(len(right) < len(refused))
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    pool = torch.randn(n * CALLS // 2, hv, V, K, device=device).to(kind)
    draw = torch.Generator().manual_seed(1)
    slots = [torch.randperm(pool.shape[0], generator=draw)[:n].int().to(device) for _ in range(CALLS)]
    states = n * hv * V * K
    apart = torch.empty(CALLS, states, device=device, dtype=kind)

    def copied(number: int) -> None:
        apart[number].copy_(pool.view(-1)[number * states // 4 :][:states])

    calls: dict[str, Callable[[int], None]] = {"copy_ of as many bytes": copied}
    for copy in right:
        calls[copy.name] = lambda number, copy=copy: copy.launch(pool, slots[number], 1.0, multiprocessors)
    found = times(calls)
    moved = 2 * states * pool.element_size()
    table = Table(title=f"{n} sequences of {hv} heads, {dtype} states: {moved / 1e6:.1f} MB")
    for column in ("kernel", "us", "TB/s"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, us in sorted(found.items(), key=lambda pair: pair[1]):
        table.add_row(name, f"{us:.2f}", f"{moved / us / 1e6:.3f}")
    console.print(table)
    if out is not None:
        about = meta(n=n, hv=hv, dtype=dtype, command=" ".join(["python", *sys.argv]))
        out.write_text(json.dumps({"meta": about, "us": found, "refused": refused}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
