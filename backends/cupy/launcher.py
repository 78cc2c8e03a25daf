"""Runners: from a Call to one launch, on a GPU or by whatever else executes the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ..launch.launcher import Launcher as GpuLauncher
from .arguments import pack
from .compiling import CupyCompiler, grid
from .specialization import Specialization

__all__ = ["Kernel", "Launcher", "compiler", "launcher"]


def launcher(backend: str, problem: Problem, config: Config) -> GpuLauncher:
    """The runner on GPUs. Raises BackendFailedError if the kernel does not compile or load."""
    return GpuLauncher(backend, problem, config, compiler(problem, config))


def compiler(problem: Problem, config: Config) -> CupyCompiler:
    """What compiles for calls of ``problem``."""
    return CupyCompiler(Specialization.of(problem, config), problem.arch)


class Kernel(Protocol):
    """The kernel, compiled by something that is no GPU's compiler."""

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: tuple[Any, ...], device: torch.device
    ) -> None:
        """Run it. ``args``: its one argument, by value. ``device``: the tensors'."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """Runs one specialisation through a :class:`Kernel`, with the arguments and the grid of a GPU's launch."""

    kernel: Kernel
    specialization: Specialization

    def __call__(self, call: Call) -> torch.Tensor:
        out = call.out
        if out is None:
            # Rows beyond the last offset belong to no sequence, and are not written.
            out = torch.empty(call.v.shape, dtype=call.q.dtype, device=call.q.device)
        if call.n == 0 or call.q.shape[1] == 0:
            return out
        blocks = grid(self.specialization, call.n, call.hv)
        self.kernel(blocks, (self.specialization.threads, 1, 1), (pack(call, out),), out.device)
        return out
