"""What ``isokern verify`` does: the suite over some backends, with progress, a table and a JSON report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...errors import UnknownNameError
from .. import backends as registered
from ..backend import Backend, Config
from ..plugins import missing_modules
from .check import Finding, Tier
from .report import Report, table
from .runner import run_checks

__all__ = ["verify_backends"]


def verify_backends(
    op: str,
    names: Sequence[str] | None,
    checks: Sequence[str] | None,
    *,
    full: bool,
    every_config: bool,
    report: Path | None,
    out: Console,
) -> bool:
    """Judge backends and print the outcome; True if every one conforms.

    Raises:
        UnknownNameError: an unknown backend or check, or a named backend whose framework is not installed.
    """
    reports: list[Report] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        for backend in _chosen(op, names, out):
            for config in _configs(backend, every_config):
                task = progress.add_task(backend.name, total=None)

                def advance(finding: Finding, task: object = task, name: str = backend.name) -> None:
                    progress.update(task, advance=1, description=f"{name} {finding.check}")  # type: ignore[arg-type]

                tier = Tier.FULL if full else Tier.FAST
                reports.append(run_checks(op, backend, config, checks, tier, advance))
                progress.remove_task(task)
    out.print(table(reports))
    for r in reports:
        for check, reason in r.excused.items():
            out.print(f"{r.backend}: {check} is relaxed: {reason}", markup=False)
        for skipped in r.skipped:
            out.print(f"{r.backend}: {skipped.check} was not tried: {skipped.why}", markup=False)
        if not r.ok:
            out.print(f"{r.backend} [{r.config}] does not conform:\n{r.describe_failures()}", markup=False)
    if report is not None:
        report.write_text(json.dumps([r.to_dict() for r in reports], indent=1, allow_nan=False) + "\n")
    return bool(reports) and all(r.ok for r in reports)


def _chosen(op: str, names: Sequence[str] | None, out: Console) -> list[Backend]:
    known = registered(op)
    for name in names or ():
        if name not in known:
            raise UnknownNameError("backend", name, known)
        if missing_modules(known[name]):
            raise UnknownNameError(f"backend (it needs {', '.join(missing_modules(known[name]))})", name, known)
    picked = [known[name] for name in names or known]
    for backend in picked:
        if missing_modules(backend):
            out.print(f"{backend.name}: not verified, needs {', '.join(missing_modules(backend))}", markup=False)
    return [b for b in picked if not missing_modules(b)]


def _configs(backend: Backend, every: bool) -> Sequence[Config | None]:
    """None stands for each problem's default. The whole space is asked for a middling problem of the op."""
    if not every:
        return (None,)
    from ..ops.fused_sigmoid_gating.case import CaseSpec
    from ..ops.fused_sigmoid_gating.describe import describe

    return tuple(backend.configs(describe(CaseSpec("space", (33, 0, 20, 1)), "cpu")))
