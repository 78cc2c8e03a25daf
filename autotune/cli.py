"""``isokern warmup``: tune models' serving workloads before serving, once per machine."""

from __future__ import annotations

from dataclasses import replace
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
        self.problem = ""

    def note(self, text: str) -> None:
        self.bars.console.print(f"{self.problem}: {text}" if self.problem else text, markup=False, highlight=False)


def warmup(
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="a model of the catalogue (see `isokern models`); repeatable; all: each"),
    ],
    tp: Annotated[
        list[int] | None,
        typer.Option(
            "--tp", help="tensor-parallel size; repeatable, of several models as far as each has it; default: 1"
        ),
    ] = None,
    workloads: Annotated[Path | None, typer.Option(help="YAML file of cases, in place of the models' own")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto (cuda where there is one)")] = "auto",
    tier: Annotated[
        Tier | None, typer.Option(help="how much of the workload; default: core on a CPU, wide on a GPU")
    ] = None,
    policy: Annotated[
        list[Policy] | None, typer.Option(help="launch mode to tune for; repeatable; all that the device has")
    ] = None,
    accuracy: Annotated[
        str | None,
        typer.Option(help="float32, or rounded: also try what rounds operands to bfloat16; default: as calls here do"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and its time, tune nothing")] = False,
    budget: Annotated[float | None, typer.Option(help="start no further problem after so many seconds")] = None,
    devices: Annotated[
        str | None, typer.Option(help="several GPUs of this host at once: 'all', or indices such as '0,2'")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="all GPUs of the Ray cluster at this address ('auto')")] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="also write the choices into this file, for all ranks of a job")
    ] = None,
    root: Annotated[Path | None, typer.Option("--root", help="an explicit store instead of the user's")] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="module or .py file that registers backends; repeatable")
    ] = None,
) -> None:
    """Tune models' serving workloads; interrupted at any point, the next run goes on from there.

    Under torchrun each rank tunes a share on its own GPU, and every host's store ends up with everything.
    """
    from .. import registry
    from ..cache.silicon import ask_ahead
    from ..cache.store import Store
    from ..cli import OP, console, import_backends
    from ..registry.accuracy import DEFAULT, require
    from ..registry.ops.fused_sigmoid_gating.workloads import load_workloads
    from .fleet_cli import find_venue, ranks_of, run_on
    from .merge import save_plan
    from .report import plan_summary, plan_table, report_summary, report_table
    from .warmup import plan_shards, shards_of
    from .worth import most_valuable_first

    venue = find_venue(device, devices, ray)
    ask_ahead(device)
    import_backends(imports)
    in_force = registry.default.environment_accuracy(OP) or DEFAULT
    under = in_force if accuracy is None else require("--accuracy", accuracy)
    cases = None if workloads is None else load_workloads(workloads)
    if root is not None:
        registry.use_store(Store.default(root))
    with ranks_of(venue) as exchange:
        out = console() if exchange is None or exchange.rank == 0 else Console(quiet=True)
        shards = shards_of(model, tp or [1])
        plan = plan_shards(shards, cases, device, tier=tier, policies=policy, accuracy=under)
        plan = replace(plan, problems=most_valuable_first(plan.problems))
        tuners = exchange.size if exchange is not None else max(1, len(venue.slots))
        if dry_run:
            out.print(plan_table(plan))
        out.print(plan_summary(plan, tuners), markup=False, highlight=False)
        if dry_run:
            return
        todo = sum(not p.known for p in plan.problems)
        with _bars(out) as bars:
            reports = run_on(venue, plan, _Display(bars, todo), budget, exchange)
        for report in reports:
            out.print(report_table(report))
            out.print(report_summary(report, tuners), markup=False, highlight=False)
            for error in report.errors:
                out.print(error, style="red", markup=False, highlight=False)
        if plan_file is not None and (exchange is None or exchange.rank == 0):
            saved = save_plan(plan, plan_file)
            out.print(
                f"plan {saved.content_hash}: {len(saved.choices)} choices in {plan_file}",
                markup=False,
                highlight=False,
            )
    raise typer.Exit(0 if all(report.ok for report in reports) else 1)


def _bars(out: Console) -> Bars:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Bars(*columns, console=out, transient=True)
