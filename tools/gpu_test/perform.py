"""In a worker: from a task to what its stage does with it."""

from __future__ import annotations

from pathlib import Path

from ...registry import backends as registered
from ...registry import spec as registered_op
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from .cells import Cell
from .sanitizer import Run
from .task import Result, Task

__all__ = ["OP", "perform"]

OP = "fused_sigmoid_gating"


def perform(task: Task) -> Result:
    """Do it. Raises whatever a broken backend makes frameworks raise: the worker's last act then."""
    match task.stage, task.what:
        case "compile", (CaseSpec() as spec, config):
            from .configs import compile_config

            return compile_config(registered(OP)[task.subject], spec, config)
        case "compile", (Cell() as cell, config):
            from .bench import compile_cell

            return compile_cell(registered(OP)[task.subject], cell, config)
        case "suite", (str(check), peers):
            from .suite import run_check

            return run_check(
                registered_op(OP), registered(OP)[task.subject], check, [registered(OP)[name] for name in peers]
            )
        case "configs", CaseSpec() as spec:
            from .configs import examine_configs

            return examine_configs(registered(OP)[task.subject], spec)
        case "properties", str(name):
            from .properties import examine_property

            return examine_property(registered(OP)[task.subject], name)
        case "sanitizer", Run() as run:
            from .sanitizer import sanitize

            return sanitize(run, task.subject)
        case "bench", (Cell() as cell, names, peer, first):
            from .bench import bench_cell

            folder = None if peer is None else Path(peer)
            return bench_cell(cell, [registered(OP)[name] for name in names], folder, first)
        case _:
            raise ValueError(f"no such task: {task}")
