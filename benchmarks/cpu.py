"""Every CPU backend, the registry's own choice and the transformers package's pure-torch functions, in one run.

    python benchmarks/cpu.py run [--save]

Same inputs, same process, interleaved in random order, medians over rounds, state slots rotated over four times what
the last-level cache holds. A floor is the bytes that a call must move, over the best rate that a copy or an update in
place of a set of that size reached. The transformers functions take expanded q and k and gates already computed: making
those is outside their time here (to their advantage), and they keep no pool, so their states are warm. Peak memory is
measured in a process of its own per row.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import typer
from record import Row, meta, save
from rich.console import Console
from rich.table import Table
from varlen import measure as measure_varlen

from isokern import registry
from isokern.autotune.measure import Bandwidth, cache_bytes
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.selection import verdicts

OP = "fused_sigmoid_gating"
BIG = {"h": 16, "hv": 32, "k": 128, "v": 128, "extra_slots": 0}
CASES = (
    CaseSpec("decode N=1 H=16 HV=32 float32", (1,), **BIG),
    CaseSpec("decode N=8 H=16 HV=32 float32", (1,) * 8, **BIG),
    CaseSpec("decode N=64 H=16 HV=32 float32", (1,) * 64, **BIG),
    CaseSpec("decode N=8 H=16 HV=32 bfloat16", (1,) * 8, **{**BIG, "state_dtype": "bfloat16"}),
    CaseSpec("mixed 16x4 H=16 HV=32", (4,) * 16, **BIG),
    CaseSpec("prefill 1x1024 H=16 HV=32", (1024,), **BIG),
    CaseSpec("prefill 4x256 H=16 HV=32", (256,) * 4, **BIG),
    CaseSpec("mixed 15x1+1x256 H=16 HV=32", (1,) * 15 + (256,), **BIG),
)
SKIP_SLOW = {"torch_reference": 512}  # token by token in Python: seconds per call beyond this many tokens
#: Sets of slots: as many as no cache holds, within reason.
CACHES, MOST_SETS = 4, 128

app = typer.Typer(add_completion=False)


_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def state_bytes(spec: CaseSpec) -> int:
    """Bytes of the live states of one call."""
    live = sum(1 for x in spec.lengths if x)
    return live * spec.hv * spec.k * spec.v * _ITEMSIZE[spec.state_dtype or "float32"]


def moved_bytes(spec: CaseSpec) -> int:
    """Bytes a call must move: live states read and written, q, k, v, a, b in, o out."""
    row = 2 * spec.h * spec.k + 2 * spec.hv * spec.v + 2 * spec.hv
    return 2 * state_bytes(spec) + spec.tokens * row * _ITEMSIZE[spec.io_dtype]


def sets_of(spec: CaseSpec) -> int:
    """How many sets of slots calls take turns with."""
    return max(2, min(MOST_SETS, -(-CACHES * cache_bytes() // state_bytes(spec))))


def calls(spec: CaseSpec, backend: str | None) -> list[Callable[[], torch.Tensor]]:
    """The op on as many sets of slots of one pool, through the registry."""
    op, sets = registry.get(OP), sets_of(spec)
    wide = spec.but(extra_slots=(sets - 1) * spec.n)
    inputs = registry.spec(OP).make_inputs(wide, 0)
    kwargs = inputs.kwargs
    slots = torch.randperm(sets * spec.n, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    return [
        partial(op, **{**kwargs, "initial_state_indices": part.clone()}, backend=backend)
        for part in slots.split(spec.n)
    ]


def transformers_calls(spec: CaseSpec) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """The package's two pure-torch functions on batches of equal length; others they cannot take unpadded."""
    if len(set(spec.lengths)) != 1:
        return {}
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as module
    except ImportError:
        return {}
    inputs = registry.spec(OP).make_inputs(spec.but(varlen=False), 0).kwargs
    group = spec.hv // spec.h
    q, k = (inputs[x].repeat_interleave(group, 2) for x in ("q", "k"))
    g = -torch.exp(inputs["A_log"]) * torch.nn.functional.softplus(inputs["a"].float() + inputs["dt_bias"])
    beta = inputs["b"].sigmoid()
    state = torch.randn(spec.n, spec.hv, spec.k, spec.v)
    found = {}
    for name in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"):
        function = getattr(module, name)
        found[f"transformers {name}"] = [
            partial(
                function, q, k, inputs["v"], g=g, beta=beta, initial_state=state, output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
        ]  # fmt: skip
    return found


def error_of(spec: CaseSpec, backend: str | None) -> float:
    """Relative 2-norm of the output against float64, on two value heads."""
    library = registry.spec(OP)
    inputs = library.make_inputs(spec, 3)
    call = library.canonical(**inputs.kwargs)
    heads = (0, spec.hv - 1)
    exact = library.reference(call, heads=heads)
    out = registry.get(OP)(**inputs.kwargs, backend=backend).flatten(0, 1)[:, list(heads)].double()
    return float((out - exact.o).norm() / exact.o.norm())


def measure(spec: CaseSpec, seconds: float, bandwidth: Bandwidth) -> list[Row]:
    accepting = (o.backend for o in verdicts(registry.backends(OP), describe(spec, "cpu")) if o.verdict)
    names = [n for n in accepting if spec.tokens <= SKIP_SLOW.get(n, spec.tokens)]
    runners: dict[str, list[Callable[[], torch.Tensor]]] = {n: calls(spec, n) for n in names}
    runners["isokern"] = calls(spec, None)
    runners |= transformers_calls(spec)
    first = {}
    for name, sets in runners.items():
        sets[0]()
        t = time.perf_counter()
        sets[-1]()
        first[name] = time.perf_counter() - t
    samples: dict[str, list[float]] = {n: [] for n in runners}
    # Five rounds of everything, then as many of the faster ones as the time allows.
    end, rounds, shuffle = math.inf, 0, random.Random(0)
    while rounds < 5 or time.perf_counter() < end:
        if rounds == 5:
            end = time.perf_counter() + seconds
        order = [n for n in runners if rounds < 5 or first[n] < 0.02 * seconds]
        shuffle.shuffle(order)
        for name in order:
            run = runners[name][rounds % len(runners[name])]
            t = time.perf_counter()
            run()
            samples[name].append(1e6 * (time.perf_counter() - t))
        rounds += 1
    decision = registry.get(OP).decide(**registry.spec(OP).make_inputs(spec, 0).kwargs)
    rows = []
    for name, values in samples.items():
        own = name in names or name == "isokern"
        row = Row(
            spec.name,
            name,
            eager_us=round(statistics.median(values), 1),
            floor_us=round(1e6 * moved_bytes(spec) / bandwidth.of(state_bytes(spec) * sets_of(spec)), 1),
        )
        row.extra = {"samples": len(values), "min_us": round(min(values), 1)}
        if own:
            row.backend = decision.backend if name == "isokern" else name
            config = decision.config if name == "isokern" else registry.get(OP).decide(
                **registry.spec(OP).make_inputs(spec, 0).kwargs, backend=name).config  # fmt: skip
            row.config = ",".join(f"{k}={v}" for k, v in config.items()) or "default"
            row.error = error_of(spec, None if name == "isokern" else name)
            row.extra["memory_ratio"] = memory_ratio(spec.name, row.backend)
            if name == "isokern":
                row.extra["rule"] = decision.rule.value
        rows.append(row)
    return rows


def memory_ratio(case: str, backend: str) -> float:
    """Peak memory of one call over inputs + outputs + pool, in a process of its own."""
    command = [sys.executable, __file__, "memory", case, backend]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["ratio"])


@app.command()
def memory(case: str, backend: str) -> None:
    """Print the peak memory of one call of CASE on BACKEND as JSON (Linux)."""
    spec = next(c for c in CASES if c.name == case)
    op, library = registry.get(OP), registry.spec(OP)
    # Compile, start thread pools and load libraries on a small twin first: they are not the call's memory. Its two
    # sequences are the shortest and the longest, cut: what works on batches of unlike lengths takes it, too.
    small = spec.but(lengths=(min(3, *spec.lengths), min(3, max(spec.lengths))))
    op(**library.make_inputs(small, 0).kwargs, backend=backend)
    kwargs = library.make_inputs(spec, 0).kwargs
    out = torch.zeros(kwargs["v"].shape, dtype=kwargs["v"].dtype)
    base = sum(t.numel() * t.element_size() for t in (*kwargs.values(), out) if isinstance(t, torch.Tensor))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    op(**kwargs, out=out, backend=backend)
    extra = max(0, _status("VmHWM") - before)
    print(json.dumps({"ratio": round((base + extra) / base, 3), "extra_bytes": extra, "base_bytes": base}))


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def dispatch_rows(seconds: float) -> list[Row]:
    """What the registry adds to a call: the whole op on a backend that does nothing, beside calling that directly."""
    library, op = registry.spec(OP), registry.get(OP)
    registry.register_backend(registry.FunctionBackend(lambda call: call.out, OP, "does_nothing", priority=-1))
    rows = []
    try:
        for name, spec in {
            "dispatch, bare cu_seqlens": CASES[1],
            "dispatch, SequenceLayout": CASES[1].but(as_layout=True),
        }.items():
            kwargs = library.make_inputs(spec, 0).kwargs
            out = torch.empty_like(kwargs["v"])
            whole = partial(op, **kwargs, out=out, backend="does_nothing")
            whole()
            samples, end = [], time.perf_counter() + seconds
            while time.perf_counter() < end:
                t = time.perf_counter()
                for _ in range(100):
                    whole()
                samples.append(1e4 * (time.perf_counter() - t))
            rows.append(Row(name, "isokern", "does_nothing", eager_us=round(statistics.median(samples), 2)))
    finally:
        registry.unregister_backend(OP, "does_nothing")
    return rows


@app.command()
def run(
    seconds: float = typer.Option(6.0, help="measuring time per case"),
    keep: bool = typer.Option(False, "--save", help="write benchmarks/results/<date>_none_cpu.json"),
    only: str = typer.Option("", help="cases whose name contains this"),
) -> None:
    """Measure every case and print the table."""
    bandwidth = Bandwidth()
    rows = []
    for spec in CASES:
        if only in spec.name:
            print(spec.name, file=sys.stderr)
            rows += measure(spec, seconds, bandwidth)
    cold = bandwidth.of(CACHES * cache_bytes())
    table = Table(title=f"CPU, {torch.get_num_threads()} threads, memory {cold / 1e9:.1f} GB/s; microseconds per call")
    for column in ("case", "implementation", "backend", "eager", "floor", "error", "memory"):
        table.add_column(column, justify="right" if column in ("eager", "floor", "error", "memory") else "left")
    for r in rows:
        error = "" if r.error is None else f"{r.error:.2e}"
        table.add_row(
            r.case, r.implementation, r.backend or "", f"{r.eager_us:.0f}", f"{r.floor_us:.0f}", error,
            str(r.extra.get("memory_ratio", "")),
        )  # fmt: skip
    Console(width=160).print(table)
    if keep:
        rows += measure_varlen(seconds) + dispatch_rows(1.0)
        print(save("cpu", "none", meta(bandwidth_gb_s=round(cold / 1e9, 2)), rows))


if __name__ == "__main__":
    app()
