"""``isokern report``: what was tuned, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ArgumentValueError, StoreError
from ..registry.ops.fused_sigmoid_gating.workload_case import Tier

__all__ = ["report"]


def report(
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write")] = Path("report.html"),
    root: Annotated[Path | None, typer.Option("--root", help="the store at this directory alone")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="also show how much of its workload is tuned")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", help="tensor-parallel size of that model")] = 1,
    tier: Annotated[
        Tier | None, typer.Option(help="how much of that workload; default: core on a CPU, wide on a GPU")
    ] = None,
    workloads: Annotated[Path | None, typer.Option(help="YAML file of cases, in place of the model's own")] = None,
    device: Annotated[str, typer.Option(help="of that workload: cpu, cuda or auto")] = "auto",
    accuracy: Annotated[
        str | None, typer.Option(help="of that workload: float32 or rounded; default: as calls here do")
    ] = None,
    quality: Annotated[Path | None, typer.Option(help="a result file of benchmarks/choice_quality.py")] = None,
) -> None:
    """Write a report of the store: winners, margins, regret, coverage, and what was refused and why."""
    from ..cache.layer import Layer
    from ..cache.store import Store
    from .html_report import write_report
    from .html_report_quality import load_quality

    if model is None:
        of_a_model = {"--tp": tp != 1, "--tier": tier, "--workloads": workloads, "--device": device != "auto"}
        given = [name for name, value in (of_a_model | {"--accuracy": accuracy}).items() if value]
        if given:
            raise ArgumentValueError(given[0], "--model beside it, whose workload it is about", "no --model")
    if root is not None and not root.is_dir():
        raise StoreError(f"{root} is not a directory")
    store = Store.default() if root is None else Store([Layer("explicit", root.absolute(), writable=True)])
    plan = None
    if model is not None:
        from .. import registry
        from ..registry.accuracy import require
        from ..registry.ops.fused_sigmoid_gating.workloads import load_workloads
        from .warmup import OP, plan_warmup

        under = registry.default.dispatcher(OP).policy() if accuracy is None else require("--accuracy", accuracy)
        cases = None if workloads is None else load_workloads(workloads)
        plan = plan_warmup(model, tp, cases, device, tier=tier, accuracy=under, store=store)
    measured = None if quality is None else load_quality(quality)
    try:
        shown, plotted = write_report(out, store, plan=plan, quality=measured)
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error.strerror or error}") from error
    typer.echo(f"{shown} problems in {out}")
    if not plotted:
        typer.echo("without plots: they need matplotlib (pip install 'isokern[report]')", err=True)
