"""``python -m isokern.engines.numba_simulator``: the conformance suite over ``numba_cuda`` on a CPU."""

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
from .engine import NumbaSimulator, SimulatedNumbaCuda


def main(
    check: Annotated[list[str] | None, typer.Option(help="Id of a check; repeat for several. Default: all.")] = None,
    full: Annotated[bool, typer.Option(help="Include the slow tier.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write findings as JSON.")] = None,
    quiet: Annotated[bool, typer.Option(help="Print failures only as they come.")] = False,
) -> None:
    """Examine the backend; exit code 1 if it does not conform."""
    torch.set_num_threads(1)
    engine = NumbaSimulator()
    console = Console()

    def tell(finding: Finding) -> None:
        bad = finding.status in (Status.FAIL, Status.ERROR)
        if bad or not quiet:
            what = f"{finding.status.upper():8} {finding.check:4} {finding.seconds:6.1f} s"
            line = f"{what}  {finding.case} {finding.message}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    tier = Tier.FULL if full else Tier.FAST
    result = run_checks(
        SimulatedNumbaCuda.op, SimulatedNumbaCuda(engine), None, check or None, tier, tell, engine=engine
    )
    console.print(table([result]))
    if report is not None:
        report.write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    raise typer.Exit(0 if result.ok else 1)


if __name__ == "__main__":
    typer.run(main)
