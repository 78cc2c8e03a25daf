"""``python -m isokern.engines.triton_interpreter``: the conformance suite over ``triton`` on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ...registry.conformance.check import Finding, Status, Tier
from ...registry.conformance.report import table
from ...registry.conformance.runner import run_checks
from .engine import InterpretedBackend, activate


def main(
    check: Annotated[list[str] | None, typer.Option(help="Id of a check; repeat for several. Default: all.")] = None,
    full: Annotated[bool, typer.Option(help="Include the slow tier.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write findings as JSON.")] = None,
    quiet: Annotated[bool, typer.Option(help="Print failures only as they come.")] = False,
) -> None:
    """Examine the backend; exit code 1 if it does not conform."""
    torch.set_num_threads(1)  # tensors of a few thousand elements: threads cost more than they give
    engine = activate()
    from ...backends.triton.backend import Triton

    def progress(finding: Finding) -> None:
        if not quiet or finding.status in (Status.FAIL, Status.ERROR):
            note = f" {finding.message}" if finding.message else ""
            typer.echo(f"{finding.status.value:8} {finding.check} {finding.case} {finding.seconds:.1f} s{note}")

    result = run_checks(
        "fused_sigmoid_gating",
        InterpretedBackend(Triton()),
        only=check or None,
        tier=Tier.FULL if full else Tier.FAST,
        on_progress=progress,
        engine=engine,
        peers=(),  # the others belong to other processes
    )
    Console().print(table([result]))
    if report is not None:
        report.write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    raise typer.Exit(0 if result.ok else 1)


if __name__ == "__main__":
    typer.run(main)
