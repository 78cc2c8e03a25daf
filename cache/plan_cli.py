"""``isokern plan``: choices as one file that all ranks of a job load, and compare by its content hash.

Exit codes: 0 done; 1 the answer is no (``check`` refuses the plan, ``diff`` found differences); 2 the command could
not do what it was asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import PlanError
from .environment import current_environment
from .plan import Plan
from .render import console, differences_table, plan_table
from .store import Store

__all__ = ["app"]

app = typer.Typer(
    name="plan",
    help="Choices as one file that all ranks of a job load.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(metavar="FILE")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: cuda where there is one")]


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@app.command("export")
def export_plan(
    file: File,
    root: Annotated[Path | None, typer.Option("--root", help="an explicit store instead of this user's")] = None,
    device: Device = "auto",
) -> None:
    """Write every choice that the store would answer with on this device."""
    from .. import registry

    prints = {
        op: {name: registry.default.fingerprint(op, name) for name in registry.backends(op)} for op in registry.names()
    }
    plan = Plan.from_store(Store.default(root), current_environment(_device(device)), prints)
    plan.save(file)
    typer.echo(f"plan {plan.content_hash}: {len(plan.choices)} choices written to {file}")


@app.command()
def show(file: File) -> None:
    """Print a plan: its hash, where it holds, and its choices."""
    plan = Plan.load(file)
    typer.echo(f"plan {plan.content_hash}, {len(plan.choices)} choices, made for {plan.environment.describe()}")
    console().print(plan_table(plan))


@app.command()
def check(
    file: File,
    content_hash: Annotated[str | None, typer.Option("--hash", help="the plan that is expected")] = None,
    device: Device = "auto",
) -> None:
    """Whether this plan can be pinned here: unaltered, of the expected hash, made for this device and versions."""
    if not file.is_file():
        raise PlanError(f"plan {file}: no such file")
    try:
        plan = Plan.load(file)
        plan.require(content_hash)
        plan.check(current_environment(_device(device)))
    except PlanError as error:
        typer.echo(f"refused: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"plan {plan.content_hash} can be pinned here: {len(plan.choices)} choices")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A")], second: Annotated[Path, typer.Argument(metavar="B")]
) -> None:
    """Compare two plans: where they hold, and each choice. Exits with 1 if anything differs."""
    found = Plan.load(first).diff(Plan.load(second))
    if found:
        console().print(differences_table(found, str(first), str(second)))
        raise typer.Exit(1)
    typer.echo("no differences")
