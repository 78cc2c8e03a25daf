"""Stage ``bench``: one cell, every config of every backend, beside SGLang's kernel. Nothing is timed that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import BackendFailedError
from ...registry.backend import Backend, Config, Runner
from ...registry.conformance.subject import chunk_of
from ...registry.decision import Rejected
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.judge import Judgement
from . import sglang
from .cells import SETS, Cell, make_calls
from .configs import EQUAL_BITS
from .conformity import Truth
from .report import timing_row
from .task import Outcome, Result, Row
from .timing import Launch, Replay, copy_bandwidth, eager_us, launches_for, race

__all__ = ["bench_cell", "compile_cell"]

#: Replays of every config, then of the best few and the default, then of the winners side by side.
_GLANCE, _ROUNDS = 3, 15
_BEST = 4
#: A peer's kernel whose output is this far off (relative 2-norm) does not do the same job.
_PEER_ERROR = 0.02


@dataclass(slots=True)
class _Entry:
    """A backend's configs on one cell: those that conform, their times, the winner."""

    backend: Backend
    runs: dict[str, Runner]
    judgements: dict[str, Judgement]
    faults: list[str]
    times: dict[str, float]
    default: str
    best: str = ""


def compile_cell(backend: Backend, cell: Cell, config: Config) -> Result:
    """Run the config once on two sequences, so that its machine code lies on the disk."""
    problem = cell.problem(_arch())
    (call,) = make_calls(replace(cell, n=2), sets=1)
    backend.bind(problem, config)(call)
    torch.cuda.synchronize()
    return Result.of([])


def _arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def bench_cell(cell: Cell, backends: Sequence[Backend], peer: Path | None, first: int | None = None) -> Result:
    """One row per backend, and one of SGLang's kernel if ``peer`` names its folder and the layout is its own.

    ``first``: only so many configs of each backend, in its own order of preference; None: all.
    """
    calls = make_calls(cell)
    truth = Truth(calls[0], cell.length)
    floor = cell.least_bytes / copy_bandwidth()
    launches = launches_for(floor, SETS)
    entries = [_timed(backend, first, calls, truth, launches) for backend in backends]
    finalists: dict[str, Launch] = {e.backend.name: e.runs[e.best] for e in entries if e.times}
    faults: tuple[str, ...] = ()
    error: float | None = None
    if peer is not None and cell.layout == "vk":
        launch = sglang.load(peer)
        truth.forget()
        judgement, _ = truth.judge(launch(truth.prepare()))
        error = judgement.rel_o
        if error <= _PEER_ERROR:
            finalists[sglang.NAME] = launch
        else:
            faults = (f"{sglang.NAME}: relative error {error:.3g}",)
    times = race({name: Replay(launch, calls, launches) for name, launch in finalists.items()}, _ROUNDS)
    eager = {name: eager_us(launch, calls) for name, launch in finalists.items()}
    rows = [_row(cell, entry, floor, times, eager) for entry in entries]
    if error is not None:
        rows.append(_peer_row(cell, floor, times, eager, error, faults))
    faults += tuple(f"{e.backend.name} {fault}" for e in entries for fault in e.faults)
    torch.cuda.empty_cache()
    facts = {"copy_TB_s": round(copy_bandwidth() / 1e6, 3)}
    return Result(Outcome.FAIL if faults else Outcome.PASS, faults, rows=tuple(rows), facts=facts)


def _timed(backend: Backend, first: int | None, calls: list[Call], truth: Truth, launches: int) -> _Entry:
    """Every config: judged, timed briefly if it is right; the best few and the default timed properly."""
    problem = calls[0].problem("graph")
    verdict = backend.check(problem)
    if isinstance(verdict, Rejected):
        return _Entry(backend, {}, {}, [f"declines: {verdict.reason}"], {}, "")
    configs = backend.configs(problem)[:first]
    entry = _Entry(backend, {}, {}, [], {}, configs[0].label)
    truth.forget()
    for config in configs:
        try:
            run = backend.bind(problem, config)
            judgement, other_bits = truth.judge(run(truth.prepare()), chunk_of(backend, config))
        except BackendFailedError as error:
            entry.faults.append(f"[{config.label}]: {error}")
            continue
        entry.faults += [f"[{config.label}]: {fault}" for fault in judgement.faults]
        if other_bits and backend.name in EQUAL_BITS:
            entry.faults.append(f"[{config.label}]: other bits than [{configs[0].label}]")
        if judgement.ok:
            entry.runs[config.label], entry.judgements[config.label] = run, judgement
    truth.forget()
    replays = {label: Replay(run, calls, launches) for label, run in entry.runs.items()}
    entry.times = race(replays, _GLANCE)
    few = sorted(entry.times, key=lambda label: entry.times[label])[:_BEST]
    chosen = {label: replays[label] for label in dict.fromkeys((*few, *replays)) if label in (*few, entry.default)}
    settled = race(chosen, _ROUNDS)
    entry.times |= settled
    entry.best = min(settled, key=lambda label: settled[label], default="")
    return entry


def _row(cell: Cell, entry: _Entry, floor: float, times: Mapping[str, float], eager: Mapping[str, float]) -> Row:
    name = entry.backend.name
    status = Outcome.FAIL if entry.faults else Outcome.PASS
    extra: dict[str, Any] = {"status": status.value, "faults": entry.faults}
    if not entry.times:
        return timing_row(cell.case, name, backend=name, floor_us=round(floor, 2), **extra)
    best, judgement = entry.best, entry.judgements[entry.best]
    extra |= {
        "of_copy": round(floor / times[name], 3),
        "us_per_token": round(times[name] / cell.length, 3),
        "bound_ratio": round(max(judgement.ratio_o, judgement.ratio_state), 3),
        "default": entry.default,
        "default_us": round(entry.times[entry.default], 2) if entry.default in entry.times else None,
        "configs": {label: round(us, 2) for label, us in entry.times.items()},
    }
    return timing_row(
        cell.case,
        name,
        backend=name,
        config=best,
        graph_us=round(times[name], 2),
        eager_us=round(eager[name], 1),
        floor_us=round(floor, 2),
        error=judgement.rel_o,
        **extra,
    )


def _peer_row(
    cell: Cell,
    floor: float,
    times: Mapping[str, float],
    eager: Mapping[str, float],
    error: float,
    faults: tuple[str, ...],
) -> Row:
    extra: dict[str, Any] = {"status": (Outcome.FAIL if faults else Outcome.PASS).value, "faults": list(faults)}
    taken = times.get(sglang.NAME)
    return timing_row(
        cell.case,
        sglang.NAME,
        graph_us=None if taken is None else round(taken, 2),
        eager_us=None if taken is None else round(eager[sglang.NAME], 1),
        floor_us=round(floor, 2),
        error=error,
        **extra,
    )
