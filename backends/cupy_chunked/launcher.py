"""Runners: from a Call to the launches, on a GPU or by whatever else executes the kernels."""

from __future__ import annotations

from functools import partial

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ..launch.chain import Chain
from ..launch.launcher import Launcher
from .arguments import workspace
from .compiling import ChunkedCompiler
from .specialization import Specialization

__all__ = ["compilers", "launcher"]


def launcher(backend: str, problem: Problem, config: Config, pieces: int) -> Chain:
    """The runner on GPUs. Raises BackendFailedError if a kernel does not compile or load."""
    launchers = [Launcher(backend, problem, config, each) for each in compilers(problem, config, pieces)]
    cut = Specialization.of(problem, config, pieces).cut
    return Chain(launchers, partial(workspace, pieces=pieces, span=cut))


def compilers(problem: Problem, config: Config, pieces: int) -> tuple[ChunkedCompiler, ...]:
    """What compiles for calls of ``problem``: one for each kernel, in the order they run in."""
    special = Specialization.of(problem, config, pieces)
    dense = problem.strides != "any" and problem.k % 8 == 0 and problem.v % 8 == 0
    return tuple(ChunkedCompiler(kernel, special, problem.arch, dense) for kernel in special.kernels)
