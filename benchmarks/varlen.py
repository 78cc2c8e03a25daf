"""Packed sequences against the same batch padded to its longest: time and memory, with the registry's own choice.

python benchmarks/varlen.py       (benchmarks/cpu.py keeps what it measures with its own)
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
import typer
from record import Row
from rich.console import Console
from rich.table import Table

from isokern import registry
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.lengths import CONVERSATION_TRACE, LengthLayout

OP = "fused_sigmoid_gating"
SHAPE = {"h": 16, "hv": 32, "k": 128, "v": 128, "extra_slots": 0}
BATCHES = {
    "packed [5, 100, 10]": (5, 100, 10),
    # What one step of a server holds: a prompt's chunk beside decode rows.
    "packed 31x1+1x512": (1,) * 31 + (512,),
    # Eight prompts drawn from a conversation trace, scaled to 1024 tokens in all.
    "packed 8 prompts": LengthLayout.prompts(CONVERSATION_TRACE, 8, tokens=1024, seed=3).lengths(),
}


def token_bytes(kwargs: dict) -> int:
    """Bytes of everything token-shaped: q, k, v, a, b and the output."""
    tensors = [kwargs[x] for x in ("q", "k", "v", "a", "b")] + [kwargs["v"]]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(seconds: float) -> list[Row]:
    """Packed and padded forms of each batch, in turn, medians."""
    op, make = registry.get(OP), registry.spec(OP).make_inputs
    rows = []
    for name, lengths in BATCHES.items():
        packed = make(CaseSpec(name, tuple(lengths), **SHAPE), 0).kwargs
        longest = max(lengths)
        padded = make(CaseSpec(name, (longest,) * len(lengths), varlen=False, **SHAPE), 0).kwargs
        runs = {"packed": (partial(op, **packed), packed), "padded": (partial(op, **padded), padded)}
        samples: dict[str, list[float]] = {x: [] for x in runs}
        for run, _ in runs.values():
            run()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples["packed"]) < 5:
            for form, (run, _) in runs.items():
                t = time.perf_counter()
                run()
                samples[form].append(1e6 * (time.perf_counter() - t))
        for form, (_, kwargs) in runs.items():
            decision = op.decide(**kwargs)
            row = Row(
                f"{name} {form}", "isokern", decision.backend, eager_us=round(statistics.median(samples[form]), 1)
            )
            rows_of_tokens = kwargs["q"].shape[0] * kwargs["q"].shape[1]
            row.extra = {"tokens": rows_of_tokens, "token_bytes": token_bytes(kwargs), "samples": len(samples[form])}
            rows.append(row)
    return rows


def main(seconds: float = 6.0) -> None:
    """Measure and print."""
    rows = measure(seconds)
    table = Table(title=f"packed against padded, {torch.get_num_threads()} threads")
    for column in ("batch", "backend", "tokens", "ms", "MiB of token tensors"):
        table.add_column(column)
    for r in rows:
        mib = f"{r.extra['token_bytes'] / 2**20:.1f}"
        table.add_row(r.case, r.backend, str(r.extra["tokens"]), f"{r.eager_us / 1e3:.2f}", mib)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
