"""The command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...registry import backends as registered
from ...registry import spec as registered_op
from ...registry.backend import Backend
from ...registry.decision import Accepted
from ...registry.plugins import missing_modules
from . import machine as machines
from .cells import CELLS, Cell, select
from .fingerprint import fingerprint
from .limits import by_case, goals
from .machine import Machine
from .perform import OP
from .plan import bench_tasks, check_tasks, compile_for_cells, compile_for_configs
from .report import Report
from .session import EXIT_OK, Plan, conduct
from .sglang import NAME as SGLANG
from .suite import check_ids
from .task import STAGES, Budget
from .workers import work_off

__all__ = ["app", "chosen_backends", "make_plan", "summary"]

app = typer.Typer(add_completion=False)

#: No CUDA device; what a wrong command line exits with as well.
EXIT_NO_DEVICE = 2


@app.command()
def run(
    stages: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(STAGES)}; default: all.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="A backend; repeat. Default: all GPU languages.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile and share the GPU.")] = 12,
    budget: Annotated[float | None, typer.Option(min=1.0, help="Seconds; what is left then is listed.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results file to merge into; what passed is not run again.")] = None,
    cells: Annotated[str | None, typer.Option(help="bench: regular expression on the cells' names.")] = None,
    quick: Annotated[bool, typer.Option(help="bench: only HV=32, float32 states, layout vk.")] = False,
    first: Annotated[
        int | None, typer.Option(min=1, help="bench: only so many configs of each backend, in its own order.")
    ] = None,
    sglang: Annotated[Path | None, typer.Option(help="bench: folder that holds the package sglang.")] = None,
    commit: Annotated[str | None, typer.Option(help="The sources' name in the report; default: what git says.")] = None,
) -> None:
    """Test and time the GPU backends on this machine's GPU. Exit status: 0 passed, 1 failed, 2 no GPU, 3 incomplete."""
    unknown = [stage for stage in stages or () if stage not in STAGES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]}: expected any of {', '.join(STAGES)}", param_hint="STAGE")
    if sglang is not None and not (sglang / "sglang").is_dir():
        raise typer.BadParameter(f"{sglang} holds no package sglang", param_hint="--sglang")
    wanted = _cells(cells, quick)
    machine = machines.find()
    if machine is None:
        typer.echo("no CUDA device", err=True)
        raise typer.Exit(EXIT_NO_DEVICE)
    report = Report(
        out,
        machines.describe_run(machine, commit),
        lambda stage, who: fingerprint(stage, who, OP, machine.gpu),
    )
    console = Console(width=170)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(f"{machine.gpu}, compute capability {machine.arch / 10}, CUDA {machine.cuda}")
    if stale := report.resume():
        say(f"{stale} rows of {out} do not describe today's sources: dropped")
    plan = make_plan(stages or list(STAGES), chosen_backends(backend, machine), machine, wanted, sglang, report, first)
    status = conduct(plan, jobs, Budget(budget), report, work_off, say)
    for table in summary(report):
        console.print(table)
    for goal in goals(report.rows.values()):
        if not goal.met:
            say(f"GOAL MISSED {goal}")
    if status != EXIT_OK:
        raise typer.Exit(status)


def _cells(pattern: str | None, quick: bool) -> tuple[Cell, ...]:
    try:
        wanted = select(pattern, quick)
    except re.error as error:
        raise typer.BadParameter(str(error), param_hint="--cells") from None
    if not wanted:
        raise typer.BadParameter(f"none of {len(CELLS)} cells is called so", param_hint="--cells")
    return wanted


def chosen_backends(names: list[str] | None, machine: Machine) -> list[Backend]:
    """Those named, or all of a GPU language that accept a plain problem of this GPU.

    Raises ``typer.BadParameter`` for an unknown one, and for one whose framework is not installed: nothing is skipped.
    """
    known = registered(OP)
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name}: expected any of {', '.join(known)}", param_hint="--backend")
    problem = CELLS[0].problem(machine.arch)
    if names:
        chosen = [known[name] for name in dict.fromkeys(names)]
    else:
        written = [b for b in known.values() if b.provenance not in ("torch", "external")]
        chosen = [b for b in written if isinstance(b.check(problem), Accepted)]
    for backend in chosen:
        if missing := missing_modules(backend):
            raise typer.BadParameter(
                f"{backend.name} needs {', '.join(missing)}, not installed", param_hint="--backend"
            )
    if not chosen:
        raise typer.BadParameter("no backend runs on this GPU", param_hint="--backend")
    return chosen


def make_plan(
    stages: list[str],
    backends: list[Backend],
    machine: Machine,
    cells: tuple[Cell, ...],
    sglang: Path | None,
    report: Report,
    first: int | None = None,
) -> Plan:
    """The tasks of the stages; compiling ahead only for what the report does not show as passed."""
    shared = check_tasks(stages, backends, check_ids(registered_op(OP)))
    left = {(task.stage, task.subject) for task in shared if not report.passed(task)}
    compile_first = [b for b in backends if ("configs", b.name) in left]
    shared = [*compile_for_configs(compile_first, machine.arch), *shared]
    alone = bench_tasks(cells, backends, sglang, first) if "bench" in stages else []
    missing = {task.case for task in alone if not report.passed(task)}
    shared += compile_for_cells([cell for cell in cells if cell.case in missing], backends, machine.arch, first)
    return Plan(shared, alone)


def summary(report: Report) -> list[Table]:
    """Per cell: the floor, each implementation's microseconds, the best backend over the floor and over SGLang."""
    cases = by_case(report.rows.values())
    if not cases:
        return []
    names = sorted({name for line in cases.values() for name in line}, key=lambda name: (name == SGLANG, name))
    grid = Table(title=f"us per call in a CUDA graph, best config; copy {report.meta.get('copy_TB_s')} TB/s")
    grid.add_column("cell", no_wrap=True)
    for heading in ("floor", *names, "of floor", "over SGLang", "best config"):
        grid.add_column(heading, justify="left" if heading == "best config" else "right")
    for case, line in cases.items():
        own = {name: row for name, row in line.items() if name != SGLANG}
        if not own:
            continue
        best = min(own.values(), key=lambda row: float(row["graph_us"]))
        ratio = best["graph_us"] / line[SGLANG]["graph_us"] if SGLANG in line else None
        grid.add_row(
            case,
            f"{best['floor_us']:.1f}",
            *(f"{line[name]['graph_us']:.1f}" if name in line else "" for name in names),
            f"{best['graph_us'] / best['floor_us']:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{best['backend']} {best['config']}",
        )
    return [grid]
