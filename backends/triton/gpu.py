"""The kernel on a GPU: is it right, and how fast. One command each, one JSON report.

    python -m isokern.backends.triton.gpu check [--out FILE] [--jobs 12] [--only N1 --only M2]
    python -m isokern.backends.triton.gpu bench [--out FILE] [--jobs 12] [--quick]

``check``: the conformance suite with the default configs, every config of several calls with equal bits demanded of
all, CUDA-graph replay, a pool beyond 2**31 elements, more than 65535 (sequence, head) pairs. Exit status 1 if anything
fails. ``bench``: every config of every cell in a CUDA graph, medians, states cold. Compiling is spread over ``--jobs``
processes, which fill Triton's cache before anything is timed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

app = typer.Typer(add_completion=False, help=__doc__)

_Out = Annotated[Path | None, typer.Option(help="Write the report here as JSON.")]
_Jobs = Annotated[int, typer.Option(help="Processes that compile, or share the GPU.")]


@app.command()
def check(
    out: _Out = None,
    jobs: _Jobs = 12,
    only: Annotated[list[str] | None, typer.Option(help="Id of a check of the suite; repeat. Default: all.")] = None,
) -> None:
    """Is it right?"""
    from .gpu_check import check_all

    report = check_all(jobs, only or None)
    _write(report, out)
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def bench(
    out: _Out = None,
    jobs: _Jobs = 12,
    quick: Annotated[bool, typer.Option(help="Only HV=32 with float32 states.")] = False,
) -> None:
    """How fast is it?"""
    from .gpu_bench import bench_all

    _write(bench_all(jobs, quick), out)


def _write(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    app()
