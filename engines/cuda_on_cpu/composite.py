"""The composites on CPU tensors, their parts the CUDA C++ backends inside the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from ...backends.composite.backend import Composite, CompositeBf16
from ...backends.composite.runner import CompositeRunner
from ...registry.backend import Backend, Config, Runner
from ...registry.decision import RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.varlen.layout import SequenceLayout
from .backend import CupyOnCpu
from .chunked import CupyChunkedBf16OnCpu, CupyChunkedOnCpu, CupyCutBf16OnCpu, CupyCutOnCpu
from .engine import CudaOnCpu, watch_also

__all__ = ["CompositeBf16OnCpu", "CompositeOnCpu", "load"]

_PARTS = (CupyOnCpu, CupyChunkedOnCpu, CupyChunkedBf16OnCpu, CupyCutOnCpu, CupyCutBf16OnCpu)


def load() -> tuple[Backend, CudaOnCpu]:
    """The composite with rounded parts inside the engine, and the engine."""
    return CompositeBf16OnCpu(), CudaOnCpu()


class _OnCpu(Composite):
    """A composite's predicate, configs and runner; on one stream, since the engine runs one launch at a time.

    Args:
        parts: those of the engine's backends that may run a part; None: all that the composite admits.
    """

    requires: ClassVar[tuple[str, ...]] = ()

    def __init__(self, parts: Sequence[Backend] | None = None) -> None:
        made = {part.name: part for part in (parts if parts is not None else [kind() for kind in _PARTS])}
        super().__init__(lambda: made)

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cpu":
            return Rejected(RejectCode.DEVICE, f"the engine runs CPU tensors, these are on {problem.device}")
        return super().check(problem)

    def bind(self, problem: Problem, config: Config) -> Runner:
        runner = super().bind(problem, config)
        assert isinstance(runner, CompositeRunner)
        return _Watched(runner)

    def sources(self) -> Sequence[Path]:
        return (*super().sources(), *sorted(p for p in Path(__file__).parent.rglob("*") if p.is_file()))

    def toolchain(self) -> Mapping[str, str]:
        return {}


class CompositeOnCpu(_OnCpu):
    """``composite`` on the CPU."""


class CompositeBf16OnCpu(_OnCpu, CompositeBf16):
    """``composite_bf16`` on the CPU."""


@dataclass(frozen=True, slots=True)
class _Watched:
    """Where addresses are watched, the offsets of a batch's runs may be read: the call does not hold them."""

    runner: CompositeRunner

    def __call__(self, call: Call) -> torch.Tensor:
        layout = call.layout
        if layout is None:
            assert call.cu_seqlens is not None
            layout = SequenceLayout(call.offsets, call.cu_seqlens)
            call = call.replace(layout=layout)
        made = [run for run in layout.runs(self.runner.threshold) if run.span.start]  # the first one's are a view
        with ExitStack() as watching:
            for run in made:
                watching.enter_context(watch_also(f"offsets of run {run.span.first}", run.layout.cu_seqlens))
            return self.runner(call)
