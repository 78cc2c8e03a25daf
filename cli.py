"""The command line: ``isokern warmup | report | explain | verify | doctor | models | cache ... | plan ...``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import ArgumentValueError, IsokernError, UnknownNameError
from .registry.ops.fused_sigmoid_gating.workload_case import Policy

__all__ = ["app", "main"]

OP = "fused_sigmoid_gating"

app = typer.Typer(
    name="isokern",
    help="Interchangeable kernels, proven equal, and the right choice among them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="a model of the catalogue (see `isokern models`)")]
TpOption = Annotated[int, typer.Option("--tp", help="tensor-parallel size")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or auto (cuda where there is one)")]
RootOption = Annotated[Path | None, typer.Option("--root", help="an explicit store instead of the user's")]
ImportOption = Annotated[
    list[str] | None, typer.Option("--import", help="module or .py file that registers backends; repeatable")
]


def console() -> Console:
    """Standard output; tables are not squeezed below 120 columns when it is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=max(plain.width, 140))


def import_backends(targets: list[str] | None) -> None:
    """Import modules, or files ending in .py, that register backends."""
    from importlib import import_module

    from .autotune.recipe import Origin, import_origin

    for target in targets or ():
        if not target.endswith(".py"):
            try:
                import_module(target)
            except ImportError as error:
                raise ArgumentValueError("--import", "a module that can be imported", f"{target}: {error}") from error
        elif Path(target).is_file():
            import_origin(Origin(Path(target).stem, str(Path(target).resolve())))
        else:
            raise UnknownNameError("file", target, ())


@app.command()
def models() -> None:
    """List the model catalogue."""
    from .registry.ops.fused_sigmoid_gating.catalogue import catalogue

    table = Table(title="models")
    for column in ("model", "H", "HV", "K", "V", "gate", "layers", "state", "tensor parallel", "source"):
        table.add_column(column, overflow="fold")
    for name, m in catalogue().items():
        shard = m.shard(1)
        gate = shard.gate.value + (" bounded" if shard.lower_bound is not None else "")
        gate += " neg. eigval" if shard.allow_neg_eigval else ""
        layers = "?" if shard.linear_layers is None else str(shard.linear_layers)
        splits = " ".join(map(str, m.tensor_parallel))
        heads = (str(x) for x in (shard.H, shard.HV, shard.K, shard.V))
        table.add_row(name, *heads, gate, layers, shard.dtypes.state, splits, m.source)
    console().print(table)


@app.command()
def explain(
    model: ModelOption,
    case: Annotated[str, typer.Option(help="a case, e.g. 'decode N=64' or 'prefill 1x1024'")],
    tp: TpOption = 1,
    device: DeviceOption = "auto",
    backend: Annotated[str | None, typer.Option(help="as if called with backend=")] = None,
    accuracy: Annotated[str | None, typer.Option(help="as if under registry.use(..., accuracy=)")] = None,
    policy: Annotated[Policy, typer.Option(help="as launched from the host, or inside a CUDA graph")] = Policy.EAGER,
    root: RootOption = None,
    imports: ImportOption = None,
) -> None:
    """Show which backend one case runs on, by which rule, and every backend's verdict with its reason."""
    from . import registry
    from .cache.store import Store
    from .registry.explain import explanation

    import_backends(imports)
    if root is not None:
        registry.use_store(Store.default(root))
    dispatcher = registry.default.dispatcher(OP)
    with nullcontext() if accuracy is None else registry.use(OP, accuracy=accuracy):
        problem = dispatcher.under_policy(_problem(model, tp, case, device, policy))
        decision = dispatcher.decide(problem, backend)
    out = console()
    for part in explanation(decision, registry.default, problem):
        out.print(part, markup=False, highlight=False)


def _problem(model: str, tp: int, case: str, device: str, policy: Policy) -> object:
    from . import registry
    from .autotune.warmup import arch_of
    from .registry.ops.fused_sigmoid_gating.catalogue import model as lookup
    from .registry.ops.fused_sigmoid_gating.concrete import concrete
    from .registry.ops.fused_sigmoid_gating.describe import describe
    from .registry.ops.fused_sigmoid_gating.workload_case import parse_case

    registry.spec(OP)
    spec, kind = concrete(lookup(model).shard(tp), parse_case(case)), _device(device)
    if kind == "cpu" and policy is Policy.GRAPH:
        raise ArgumentValueError("--policy", "eager on a CPU, which has no graphs", policy.value)
    return describe(spec, kind, arch_of(registry.default.environment(kind)), policy.value)


def _device(name: str) -> str:
    if name not in ("cpu", "cuda", "auto"):
        raise ArgumentValueError("--device", "cpu, cuda or auto", name)
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ArgumentValueError("--device", "a machine with a CUDA device for 'cuda'", "none found")
    return "cuda" if name != "cpu" and available else "cpu"


@app.command()
def verify(
    backend: Annotated[list[str] | None, typer.Option("--backend", "-b", help="which backends; default all")] = None,
    check: Annotated[list[str] | None, typer.Option("--check", "-c", help="which checks, by id; default all")] = None,
    full: Annotated[bool, typer.Option("--full", help="the long cases too")] = False,
    every_config: Annotated[bool, typer.Option("--every-config", help="each config, not only the default")] = False,
    report: Annotated[Path | None, typer.Option(help="write the findings as JSON")] = None,
    device: DeviceOption = "auto",
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="processes; default as many as are worth it, 1 is this one"),
    ] = None,
    imports: ImportOption = None,
) -> None:
    """Run the conformance suite and print backend x check. Exit status 1 if anything fails.

    GPU backends run on the GPU; where there is none, or with --device cpu, in their CPU engines. Where the output is no
    terminal, a line says how each check ended, when it did.
    """
    from .registry.conformance.cli import verify_backends

    import_backends(imports)
    ok = verify_backends(
        OP,
        backend,
        check,
        full=full,
        every_config=every_config,
        report=report,
        out=console(),
        device=device,
        jobs=jobs,
        imports=imports or (),
    )
    raise typer.Exit(0 if ok else 1)


@app.command()
def doctor() -> None:
    """Examine packages, devices, backends, overrides and the store. Exit status 1 if something is broken."""
    from . import registry
    from .registry.doctor import examine

    items = examine(registry.default)
    table = Table(title="isokern doctor")
    for column in ("topic", "name", "state", "finding"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "absent": "dim", "bad": "bold red"}
    for item in items:
        table.add_row(item.topic, item.name, f"[{colours[item.state]}]{item.state}[/]", escape(item.text))
    console().print(table)
    raise typer.Exit(1 if any(item.state == "bad" for item in items) else 0)


def main() -> None:
    """Entry point: isokern's own errors are one line and exit status 2; anything else is a bug and keeps its trace."""
    from .autotune.cli import warmup
    from .autotune.report_cli import report
    from .cache.cli import app as cache_app
    from .cache.plan_cli import app as plan_app

    app.command()(warmup)
    app.command()(report)
    app.add_typer(cache_app, name="cache")
    app.add_typer(plan_app, name="plan")
    try:
        app()
    except IsokernError as error:
        Console(stderr=True).print(f"[bold red]isokern:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
