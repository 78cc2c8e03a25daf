"""One implementation's call on each cell, once between the profiler's start and stop; says what it ran as JSON lines.

`{"pid": n}` first, `{"begin": case}` before each cell and `{"call": {...}}` after it. Making the inputs, compiling and
warming up are outside the profiled ranges; a range has a mark (``counters_mark``) and then the call's kernels. The call
finds its states where serving does: it names other slots than the calls that warmed it up, and ncu empties the caches.
Results are not judged here; benchmarks/peers.py does that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers_cells import Cell
from peers_child import OP, OWN, Bench, bound_for, only_own, own_decision, verdict_on

from isokern import registry
from isokern.backends.external.adapter import Adapter
from isokern.cache import Layer, Store
from isokern.errors import IsokernError
from isokern.registry.backend import Backend, Config
from isokern.registry.decision import Rejected

__all__ = ["run_cells"]

#: Sets of slots: one that warms up, one that is profiled. More would only be memory to save and restore.
_SETS = 2
_WARM = 2

Say = Callable[[dict[str, Any]], None]


def run_cells(
    who: str, cells: Sequence[Cell], device: str, store: Path | None, named: Mapping[str, str], say: Say
) -> None:
    """Run each cell's call, profiled where there is a GPU; isokern's is its choice in graphs under the policy in force.

    Args:
        store: of tuned choices; None: the user's.
        named: case to the label of the config to run. Where a case is not there, the library's shortcut for slots
            that are all valid if it has one, else the first config.
    """
    say({"pid": os.getpid()})
    if store is not None:
        registry.use_store(Store([Layer("explicit", store, writable=True)]))
    if who == OWN:
        only_own()
    for number, cell in enumerate(cells, 1):
        say({"begin": cell.case})
        call = {"case": cell.case, "implementation": who, "group": cell.group}
        try:
            with torch.no_grad():
                call |= _run(who, cell, number, device, named.get(cell.case))
        except (IsokernError, RuntimeError, ValueError, TypeError, AssertionError) as error:
            call |= {"status": "failed", "fault": f"{type(error).__name__}: {error}"[:600]}
        say({"call": call})
        if device != "cpu":
            torch.cuda.synchronize()  # a device that is lost ends the process here, and costs this cell
            torch.cuda.empty_cache()


def _run(who: str, cell: Cell, number: int, device: str, label: str | None) -> dict[str, Any]:
    if who != OWN and isinstance(verdict := verdict_on(registry.backends(OP)[who], cell, device), Rejected):
        return {"status": "declined", "fault": f"[{verdict.code}] {verdict.reason}"}
    bench = Bench(cell, device, _SETS)
    run, calls, what = _own(bench) if who == OWN else _named(registry.backends(OP)[who], bench, label)
    for _ in range(_WARM):
        run(calls[0])
    bench.wait()
    if device == "cpu":
        run(calls[-1])
    else:
        _profiled(lambda: run(calls[-1]), number)
    return what | {"status": "ran"}


def _own(bench: Bench) -> tuple[Callable[[Any], Any], Sequence[Any], dict[str, Any]]:
    """The choice for graphs, bound by hand: called from the host, the op would take its choice for the host."""
    problem, decision = own_decision(bench.calls[0], bench.device)
    config = Config.from_dict(decision.config)
    run = registry.backends(OP)[decision.backend].bind(problem, config)
    what = {"backend": decision.backend, "config": config.label, "rule": decision.rule.value}
    return run, bench.with_out(), what


def _named(
    backend: Backend, bench: Bench, label: str | None
) -> tuple[Callable[[Any], Any], Sequence[Any], dict[str, Any]]:
    """As the comparison calls it: a library returns a tensor of its own, and may use what holds for these calls."""
    problem = bench.calls[0].problem(bound_for(backend, bench.device))
    configs = list(backend.configs(problem))
    calls: Sequence[Any] = bench.with_out()
    if isinstance(backend, Adapter):
        configs = [*backend.shortcuts(problem), *configs]
        calls = bench.calls
    config = configs[0] if label is None else next((c for c in configs if c.label == label), None)
    if config is None:
        raise ValueError(f"{label}: not among the configs of {backend.name} here")
    return backend.bind(problem, config), calls, {"backend": backend.name, "config": config.label}


def _profiled(launch: Callable[[], Any], number: int) -> None:
    from counters_mark import mark

    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    mark(number, count)  # compiles
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        mark(number, count)
        launch()
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()
