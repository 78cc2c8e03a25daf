"""``isokern warmup``: tune a model's serving workload before serving, once per machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ..registry.ops.fused_sigmoid_gating.workload_case import Policy, Tier
from .progress import Progress

__all__ = ["warmup"]


class _Display(Progress):
    """Two bars: problems done, and the steps of the current stage; a line per finished problem."""

    def __init__(self, bars: Bars, total: int) -> None:
        self.bars = bars
        self.problems: TaskID = bars.add_task("problems", total=total)
        self.steps: TaskID = bars.add_task("", total=None, visible=False)
        self.problem = ""

    def begin(self, problem: str, index: int, total: int) -> None:
        self.problem = problem
        self.bars.update(self.problems, description=problem, completed=index, total=total)

    def stage(self, name: str, steps: int) -> None:
        self.bars.reset(self.steps, total=steps, description=f"  {name}", visible=True)

    def advance(self, detail: str) -> None:
        self.bars.advance(self.steps)

    def end(self, problem: str, outcome: str, seconds: float) -> None:
        self.bars.advance(self.problems)
        self.bars.update(self.steps, visible=False)
        self.bars.console.print(f"{problem}: {outcome} ({seconds:.1f} s)", markup=False, highlight=False)

    def note(self, text: str) -> None:
        self.bars.console.print(f"{self.problem}: {text}" if self.problem else text, markup=False, highlight=False)


def warmup(
    model: Annotated[str, typer.Option("--model", "-m", help="a model of the catalogue (see `isokern models`)")],
    tp: Annotated[int, typer.Option("--tp", help="tensor-parallel size")] = 1,
    workloads: Annotated[Path | None, typer.Option(help="YAML file of cases, in place of the model's own")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto (cuda where there is one)")] = "auto",
    tier: Annotated[Tier, typer.Option(help="how much of the workload")] = Tier.CORE,
    policy: Annotated[
        list[Policy] | None, typer.Option(help="launch mode to tune for; repeatable; all that the device has")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and its time, tune nothing")] = False,
    budget: Annotated[float | None, typer.Option(help="start no further problem after so many seconds")] = None,
    root: Annotated[Path | None, typer.Option("--root", help="an explicit store instead of the user's")] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="module or .py file that registers backends; repeatable")
    ] = None,
) -> None:
    """Tune a model's serving workload; interrupted at any point, the next run goes on from there."""
    from .. import registry
    from ..cache.store import Store
    from ..cli import console, import_backends
    from ..registry.ops.fused_sigmoid_gating.workloads import load_workloads
    from .report import plan_summary, plan_table, report_summary, report_table
    from .warmup import plan_warmup, run_warmup

    import_backends(imports)
    out = console()
    cases = None if workloads is None else load_workloads(workloads)
    if root is not None:
        registry.use_store(Store.default(root))
    plan = plan_warmup(model, tp, cases, device, tier=tier if cases is None else Tier.FULL, policies=policy)
    if dry_run:
        out.print(plan_table(plan))
    out.print(plan_summary(plan), markup=False, highlight=False)
    if dry_run:
        return
    todo = sum(not p.known for p in plan.problems)
    with _bars(out) as bars:
        report = run_warmup(plan, _Display(bars, todo), budget_s=budget)
    out.print(report_table(report))
    out.print(report_summary(report), markup=False, highlight=False)
    for error in report.errors:
        out.print(error, style="red", markup=False, highlight=False)
    raise typer.Exit(0 if report.ok else 1)


def _bars(out: Console) -> Bars:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Bars(*columns, console=out, transient=True)
