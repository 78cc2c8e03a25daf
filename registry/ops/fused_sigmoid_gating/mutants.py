"""Planted faults as backends: what the conformance suite has to reject, however fast it were.

Each is one correct implementation (``mutant_seams``) with one fault in it. ``mutant("")`` is the implementation
without a fault, which must pass everything its planted siblings fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ....errors import UnknownNameError
from ...backend import Backend, Config, Runner
from ...decision import Accepted, RejectCode, Rejected, Verdict
from .mutant_memory import MEMORY_FAULTS
from .mutant_seams import Seams
from .mutant_values import VALUE_FAULTS
from .problem import Problem

__all__ = ["MUTANTS", "FaultBackend", "mutant"]

_FAULTS: dict[str, type[Seams]] = {**VALUE_FAULTS, **MEMORY_FAULTS}

#: Name of each planted fault, and what it does.
MUTANTS: dict[str, str] = {name: (seams.__doc__ or name).strip() for name, seams in _FAULTS.items()}


class FaultBackend(Backend):
    """``Seams``, or a faulty subclass, as a backend. All problems share one runner, so that a fault may remember."""

    op: ClassVar[str] = "fused_sigmoid_gating"
    provenance: ClassVar[str] = "torch"
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "batch_invariant"})
    priority: ClassVar[int] = -1

    def __init__(self, name: str, seams: Seams) -> None:
        self.name = name  # type: ignore[misc]  # a class attribute of backends that exist once
        self._seams = seams

    def check(self, problem: Problem) -> Verdict:
        if problem.grad:
            return Rejected(RejectCode.GRAD, "not differentiable")
        if not problem.lengths_on_host:
            return Rejected(RejectCode.FEATURE, "needs the lengths on the host")
        if "float64" in (problem.io_dtype, problem.state_dtype, problem.intermediate_dtype):
            return Rejected(RejectCode.DTYPE, "computes in float32")
        return Accepted()

    def bind(self, problem: Problem, config: Config) -> Runner:
        return self._seams

    def sources(self) -> Sequence[Path]:
        names = ("mutants", "mutant_seams", "mutant_values", "mutant_memory")
        return tuple(Path(__file__).with_name(f"{name}.py") for name in names)


def mutant(name: str) -> FaultBackend:
    """A new backend with the fault ``name`` of MUTANTS planted; the empty name plants none.

    Raises:
        UnknownNameError: no fault of that name.
    """
    if not name:
        return FaultBackend("no_fault", Seams())
    if name not in _FAULTS:
        raise UnknownNameError("fault", name, _FAULTS)
    return FaultBackend(f"fault_{name}", _FAULTS[name]())
