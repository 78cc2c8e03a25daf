"""EngineBackend: a CUDA C++ backend on CPU tensors, its kernels run by the engine instead of a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...backends.cupy.backend import Cupy
from ...backends.cupy.compiling import NAME, source
from ...backends.cupy.launcher import Launcher
from ...backends.cupy.specialization import Specialization
from ...registry.backend import Backend, Config, Runner
from ...registry.decision import RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .engine import CudaOnCpu
from .raw_kernel import CpuRawKernel

__all__ = ["CupyOnCpu", "load"]


def load() -> tuple[Backend, CudaOnCpu]:
    """The backend inside the engine, and the engine."""
    return CupyOnCpu(), CudaOnCpu()


class CupyOnCpu(Cupy):
    """The ``cupy`` backend's predicate, configs, argument packing and kernel source, on the CPU.

    Problems are shown to the predicate with their device replaced by a GPU; everything else is the product's own.
    """

    requires: ClassVar[tuple[str, ...]] = ()

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cpu":
            return Rejected(RejectCode.DEVICE, f"the engine runs CPU tensors, these are on {problem.device}")
        return super().check(_on_gpu(problem))

    def configs(self, problem: Problem) -> Sequence[Config]:
        return super().configs(_on_gpu(problem))

    def bind(self, problem: Problem, config: Config) -> Runner:
        specialization = Specialization.of(_on_gpu(problem), config)
        return Launcher(_kernel(specialization), specialization)

    def sources(self) -> Sequence[Path]:
        return (*super().sources(), *sorted(p for p in Path(__file__).parent.rglob("*") if p.is_file()))

    def toolchain(self) -> Mapping[str, str]:
        return {}


class _CpuKernel:
    """The engine's kernel with the launcher's call shape."""

    def __init__(self, kernel: CpuRawKernel) -> None:
        self.kernel = kernel

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: tuple[Any, ...], device: torch.device
    ) -> None:
        if device.type != "cpu":
            raise ValueError(f"the engine runs CPU tensors, these are on {device}")
        self.kernel(grid, block, args)


@cache
def _kernel(specialization: Specialization) -> _CpuKernel:
    kernel = CpuRawKernel(source(), NAME, specialization.options())
    kernel.compile()
    return _CpuKernel(kernel)


def _on_gpu(problem: Problem) -> Problem:
    return replace(problem, device="cuda", arch=90)
