"""Runners: from a call to a launch of the kernel, compiled for a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

from ...errors import BackendFailedError
from ...registry.backend import Config, Runner
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ..launch.launcher import Launcher as GpuLauncher
from .arguments import constants, grid, integers, options, pointers, reals, tiles
from .kernel import recurrent

__all__ = ["Launcher", "launcher"]


def launcher(backend: str, problem: Problem, config: Config) -> Runner:
    """The runner. Raises BackendFailedError if the kernel does not compile or load.

    Under ``TRITON_INTERPRET`` there is nothing to compile, and Triton itself runs the kernel.
    """
    if not isinstance(recurrent, JITFunction):
        return Launcher.of(problem, config)
    from .compiling import TritonCompiler

    return GpuLauncher(backend, problem, config, TritonCompiler(problem, config))


@dataclass(frozen=True, slots=True)
class Launcher:
    """Runs the kernel by Triton's own launch, ``recurrent[grid](...)``: what the interpreter offers.

    Attributes:
        problem, config: what it was bound to; for error messages.
        tiles: programs per (sequence, value head).
        constants: the kernel's compile-time arguments.
    """

    problem: Problem
    config: Config
    tiles: int
    constants: Mapping[str, int | bool]

    @classmethod
    def of(cls, problem: Problem, config: Config) -> Launcher:
        return cls(problem, config, tiles(problem, config), constants(problem, config))

    def __call__(self, call: Call) -> torch.Tensor:
        """Raises BackendFailedError if Triton refuses."""
        out = call.out
        if out is None:
            out = torch.empty(call.v.shape, dtype=call.q.dtype, device=call.q.device)
        n = call.n
        if n == 0 or call.q.shape[1] == 0:
            return out
        arguments = (*pointers(call, out), *reals(call), *integers(call, out))
        try:
            recurrent[grid(self.tiles, n, call.hv)](*arguments, **self.constants, **options(self.config))
        except (CompilationError, RuntimeError) as error:
            raise BackendFailedError(
                "fused_sigmoid_gating", "triton", self.config.label, self.problem.label, "launch", str(error)
            ) from error
        return out
