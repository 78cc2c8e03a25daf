"""The backend on a GPU: ``python -m isokern.backends.numba_cuda.gpu compile|check|bench``.

``compile`` needs no GPU: it fills the directory of compiled kernels (``ISOKERN_CACHE``) for what ``bench`` runs, in
parallel processes. ``check``: the conformance suite, every config with equal bits, graph replay, a pool beyond 2**31
elements, 70000 sequences; exit status 1 if anything fails. ``bench``: every config of every cell in CUDA graphs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True)

Out = Annotated[Path | None, typer.Option(help="Write the report here as JSON.")]
Jobs = Annotated[int, typer.Option(help="Processes.")]


@app.command(name="compile")
def compile_all(arch: int = 90, jobs: Jobs = 8, quick: bool = False) -> None:
    """Compile what ``bench`` will run."""
    from .gpu_bench import compile_cells

    typer.echo(f"{compile_cells(arch, jobs, quick)} kernels")


@app.command()
def check(out: Out = None, jobs: Jobs = 8) -> None:
    """Is it right?"""
    from .gpu_check import check

    report = check(jobs)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def bench(out: Out = None, quick: bool = False) -> None:
    """How fast is it?"""
    from .gpu_bench import bench

    report = bench(quick)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    app()
