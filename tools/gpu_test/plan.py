"""From what is asked for to the tasks that answer it. Touches no device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ...registry.backend import Backend, Config
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.describe import describe
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .cases import CONFIG_CASES
from .cells import Cell
from .properties import PROPERTIES
from .sanitizer import PLAIN, RUNS
from .sglang import NAME as SGLANG
from .task import Task

__all__ = ["bench_tasks", "check_tasks", "compile_for_cells", "compile_for_configs"]

#: Seconds. A sanitizer makes every call a hundred times slower, and loads every module first.
_SANITIZER_LIMIT = 400.0
_CELL_LIMIT = 150.0


def check_tasks(stages: Sequence[str], backends: Sequence[Backend], checks: Sequence[str]) -> list[Task]:
    """The tasks of the stages that share the GPU, what takes longest first.

    Args:
        checks: ids of the suite's checks, in the order to run them.
    """
    names = [backend.name for backend in backends]
    tasks: list[Task] = []
    if "sanitizer" in stages:
        # Compiles what the tools then find on the disk, and shows that the list passes without them.
        tasks += [Task("sanitizer", name, PLAIN.name, PLAIN) for name in names]
    if "suite" in stages:
        for check in checks:
            tasks += [Task("suite", name, f"suite {check}", (check, _peers(check, name, names))) for name in names]
    if "sanitizer" in stages:
        tasks += [Task("sanitizer", name, run.name, run, _SANITIZER_LIMIT) for run in RUNS for name in names]
    if "properties" in stages:
        tasks += [Task("properties", name, prop, prop) for prop in PROPERTIES for name in names]
    if "configs" in stages:
        tasks += [Task("configs", name, f"every config: {case.name}", case) for case in CONFIG_CASES for name in names]
    return tasks


def _peers(check: str, name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Only X1 hands states from one backend to another."""
    return tuple(other for other in names if other != name) if check == "X1" else ()


def compile_for_configs(backends: Sequence[Backend], arch: int) -> list[Task]:
    """Every config of the cases, a process each: what stage ``configs`` would compile one after another."""
    return [
        _compile(backend, case.name, (case, config), config)
        for case in CONFIG_CASES
        for backend in backends
        for config in _configs(backend, describe(_on_device(case), "cuda", arch))
    ]


def _configs(backend: Backend, problem: Problem) -> Sequence[Config]:
    """None of a problem that it declines."""
    return backend.configs(problem) if backend.check(problem) else ()


def _on_device(case: CaseSpec) -> CaseSpec:
    """Without a SequenceLayout: a GPU call's lengths are then not on the host, as in the stage itself."""
    return case.but(as_layout=False)


def compile_for_cells(
    cells: Sequence[Cell], backends: Sequence[Backend], arch: int, first: int | None = None
) -> list[Task]:
    """Every config, or the ``first`` ones, of every kind of cell, once."""
    tasks: dict[tuple[object, ...], Task] = {}
    for cell in cells:
        problem = cell.problem(arch)
        for backend in backends:
            for config in _configs(backend, problem)[:first]:
                key = (cell.kind, backend.name, config)
                tasks.setdefault(key, _compile(backend, cell.case, (cell, config), config))
    return list(tasks.values())


def _compile(backend: Backend, case: str, what: tuple[object, Config], config: Config) -> Task:
    return Task("compile", backend.name, f"{case} [{config.label}]", what)


def bench_tasks(
    cells: Sequence[Cell], backends: Sequence[Backend], sglang: Path | None, first: int | None = None
) -> list[Task]:
    """A task per cell: all backends and SGLang's kernel (layout vk), side by side."""
    names = tuple(backend.name for backend in backends)
    tasks = []
    for cell in cells:
        peers = (SGLANG,) if sglang is not None and cell.layout == "vk" else ()
        what = (cell, names, None if sglang is None else str(sglang), first)
        tasks.append(Task("bench", "all", cell.case, what, _CELL_LIMIT, (*names, *peers)))
    return tasks
