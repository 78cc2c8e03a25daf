"""Planted candidates: kernels that are wrong, or broken, each in its own way, raced against one that is right.

Every one must be rejected with the reason it deserves, and cost the right one no sample.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from record import Row
from rich.console import Console

from isokern.autotune.recipe import ProblemRecipe
from isokern.autotune.tuner import Limits, Task, Workers, default_settings, tune_problem
from isokern.autotune.warmup import HOOKS, OP, arch_of
from isokern.cache import CandidateRecord, Layer, Store
from isokern.registry.core import Registry
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

__all__ = ["judged", "planted", "planted_summary"]

_FILE = Path(__file__).parents[1] / "tests" / "planted_cuda.py"
#: Large enough that what a trap does beside its kernel takes little of the time: none may be left out as slow.
_CASE = CaseSpec(
    "decode N=64", (1,) * 64, h=4, hv=8, k=128, v=128, state_layout="vk", as_layout=True, extra_slots=3, padded=(2,)
)
#: A kernel that hangs is waited for this long.
_LIMITS = Limits(call=6.0, gate=60.0)


def planted(device: str, modes: Iterable[Literal["eager", "graph"]], out: Console) -> list[Row]:
    """Tune a decode step among the planted candidates, in each launch mode; a row per candidate and mode."""
    module = _load()
    expected = {kind.name: None if code is None else code.value for kind, code in module.EXPECTED.items()}
    registry = Registry(load_plugins=False)
    for name in tuple(registry.backends(OP)):
        registry.unregister_backend(OP, name)
    for kind in module.EXPECTED:
        registry.register_backend(kind())
    environment = registry.environment(device)
    settings = replace(default_settings(device), limits=_LIMITS)
    rows = []
    for mode in modes:
        task = Task(
            ProblemRecipe(OP, _CASE, adversarial_twin(_CASE), HOOKS, 0, device, mode),
            describe(_CASE, environment.device, arch_of(environment), mode),
        )
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="isokern-planted-") as root, Workers(device, 1, _LIMITS) as workers:
            entry = tune_problem(
                task,
                registry=registry,
                store=Store([Layer("explicit", Path(root), writable=True)]),
                environment=environment,
                workers=workers,
                settings=settings,
            )
        for record in entry.candidates:
            row = judged(record, expected[record.backend], mode)
            rows.append(row)
            mark = "ok " if row.extra["as_expected"] else "BAD"
            out.print(f"planted {mode} {mark} {record.backend}: {row.extra['got']}", markup=False, highlight=False)
        out.print(f"planted {mode}: winner {entry.label}, {time.monotonic() - began:.0f} s", markup=False)
    return rows


def judged(record: CandidateRecord, expected: str | None, mode: str) -> Row:
    """A candidate's verdict against the one it deserves; a right one must have samples, or be slower than another."""
    right = record.code in (None, "slow") and bool(record.samples_us)
    as_expected = right if expected is None else record.code == expected
    got = f"{record.code}: {record.reason}" if record.code else f"{len(record.samples_us or ())} samples"
    extra = {"what": "planted", "as_expected": as_expected, "expected": expected or "right", "got": got}
    times = {f"{mode}_us": record.median_us} if record.median_us is not None else {}
    return Row(f"{mode} {_CASE.name}", record.backend, extra=extra, **times)


def planted_summary(rows: Iterable[Row]) -> dict[str, Any] | None:
    """How many of the planted candidates ended as they should; None if there were none."""
    found = [row for row in rows if row.extra["what"] == "planted"]
    wrong = [f"{row.case} {row.implementation}: {row.extra['got']}" for row in found if not row.extra["as_expected"]]
    return {"candidates": len(found), "as_expected": len(found) - len(wrong), "wrong": wrong} if found else None


def _load() -> ModuleType:
    name = _FILE.stem
    spec = importlib.util.spec_from_file_location(name, _FILE)
    if spec is None or spec.loader is None:
        raise ImportError(f"{_FILE} is not a Python module")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
