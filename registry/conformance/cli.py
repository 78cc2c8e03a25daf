"""What ``isokern verify`` does: the suite over some backends, with progress, a table and a JSON report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...engines import EngineInfo, MissingEngineError, engine_for
from ...engines.session import EngineSession
from ...errors import ArgumentValueError, IsokernError, UnknownNameError
from .. import backends as registered
from .. import spec as spec_of
from ..backend import Backend, Config
from ..plugins import missing_modules
from .check import Finding, Tier
from .report import Report, table
from .runner import belongs_elsewhere, run_checks

__all__ = ["DEVICES", "verify_backends"]

#: What ``--device`` may name: ``auto`` is the GPU where there is one.
DEVICES = ("auto", "cpu", "cuda")


def verify_backends(
    op: str,
    names: Sequence[str] | None,
    checks: Sequence[str] | None,
    *,
    full: bool,
    every_config: bool,
    report: Path | None,
    out: Console,
    device: str = "auto",
) -> bool:
    """Judge backends and print the outcome; True if every one conforms.

    A GPU backend runs on the GPU, or, on a machine without one and with ``device="cpu"``, in its CPU engine. With
    ``device="auto"`` what no GPU can check (every address, every schedule) is checked in the engine, so that the table
    has the same rows everywhere.

    Raises:
        UnknownNameError: an unknown backend or check.
        ArgumentValueError: a device that is not here, or that a named backend does not run on.
        MissingEngineError: a backend to be verified in its CPU engine, which lacks something.
        IsokernError: a named backend whose framework is not installed.
    """
    tier = Tier.FULL if full else Tier.FAST
    known = {c.id for c in spec_of(op).checks()}
    for name in checks or ():
        if name not in known:
            raise UnknownNameError("check", name, known)
    reports: list[Report] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        for place in _places(op, names, device, out):
            for config in _configs(place, every_config):
                task = progress.add_task(place.backend.name, total=None)

                def advance(finding: Finding, task: object = task, name: str = place.backend.name) -> None:
                    progress.update(task, advance=1, description=f"{name} {finding.check}")  # type: ignore[arg-type]

                reports.append(_run(op, place, config, checks, tier, advance))
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


@dataclass(frozen=True, slots=True)
class _Place:
    """A backend, and what it is to run on: a device, or an engine on the CPU.

    Attributes: ``beside``, the engine for what the device cannot check.
    """

    backend: Backend
    device: str
    engine: EngineInfo | None = None
    beside: EngineInfo | None = None


def _places(op: str, names: Sequence[str] | None, device: str, out: Console) -> list[_Place]:
    """Where each backend runs. Of those not named, what cannot run here is listed as not verified."""
    known = registered(op)
    for name in names or ():
        if name not in known:
            raise UnknownNameError("backend", name, known)
    devices = _devices(device)
    chosen: list[_Place] = []
    for name in names or known:
        try:
            place = _place(op, known[name], devices, named=bool(names))
        except MissingEngineError:
            raise  # installed, so asked for; never passed over
        except IsokernError as error:
            if names:
                raise
            out.print(f"{name}: not verified: {error}", markup=False, highlight=False)
        else:
            chosen.append(place)
    return chosen


def _devices(device: str) -> tuple[str, ...]:
    """The devices to try a backend on, the first that it runs on counts."""
    if device not in DEVICES:
        raise ArgumentValueError("--device", " or ".join(DEVICES), repr(device))
    if device == "cpu":
        return ("cpu",)
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ArgumentValueError("--device", "a machine with a CUDA device for 'cuda'", "none found")
    return ("cuda",) if device == "cuda" else ("cuda", "cpu") if available else ("cpu",)


def _place(op: str, backend: Backend, devices: Sequence[str], named: bool) -> _Place:
    missing = missing_modules(backend)
    engine = engine_for(backend) if "cuda" not in devices else None
    if engine is not None and (named or not missing):
        engine.require()
        return _Place(backend, "cpu", engine)
    if missing:
        raise IsokernError(f"backend {backend.name!r} needs {', '.join(missing)}: {_advice(backend)}")
    reasons = []
    for device in devices:
        reason = belongs_elsewhere(op, backend, device)
        if reason is None:
            beside = engine_for(backend) if device == "cuda" and "cpu" in devices else None
            return _Place(backend, device, beside=None if beside is None or beside.missing() else beside)
        reasons.append(reason)
    raise ArgumentValueError("--device", f"one that {backend.name!r} runs on", devices[0], "; ".join(reasons))


def _advice(backend: Backend) -> str:
    extras = {"triton": "triton", "cupy": "cupy-cuda13x", "numba_cuda": "numba-cuda", "numba": "numba"}
    known = [extras[module] for module in backend.requires if module in extras]
    return f"pip install 'isokern[{','.join(known)}]'" if known else "install what its distribution asks for"


def _run(
    op: str,
    place: _Place,
    config: Config | None,
    checks: Sequence[str] | None,
    tier: Tier,
    advance: Callable[[Finding], None],
) -> Report:
    if place.engine is None:
        report = run_checks(op, place.backend, config, checks, tier, advance, device=place.device)
        left = [skipped.check for skipped in report.skipped]
        if place.beside is None or not left:
            return report
        with EngineSession(place.backend.name) as session:
            return report.joined(session.run_checks(left, tier, config, advance))
    with EngineSession(place.backend.name) as session:
        return session.run_checks(checks, tier, config, advance)


def _configs(place: _Place, every: bool) -> Sequence[Config | None]:
    """None stands for each problem's default. The whole space is asked for a middling problem of the op."""
    if not every:
        return (None,)
    from ..ops.fused_sigmoid_gating.case import CaseSpec
    from ..ops.fused_sigmoid_gating.describe import describe

    # Configs depend on the kind of device; an engine presents its tensors as an sm_90's.
    on_gpu = place.engine is not None or place.device == "cuda"
    middling = CaseSpec("space", (33, 0, 20, 1))
    return tuple(place.backend.configs(describe(middling, "cuda", 90) if on_gpu else describe(middling, "cpu")))
