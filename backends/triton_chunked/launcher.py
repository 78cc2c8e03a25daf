"""Runners: from a Call to the two launches, compiled for a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

from ...errors import BackendFailedError
from ...registry.backend import Config, Runner
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ..triton.arguments import TENSOR_OF
from .arguments import (
    numbers,
    prepare_constants,
    prepare_grid,
    prepare_options,
    scan_constants,
    scan_grid,
    scan_options,
    workspace,
)
from .prepare import prepare
from .scan import scan

__all__ = ["Interpreted", "compilers", "launcher"]

#: Memory of so many 32-bit words for one call.
Allocate = Callable[[int, torch.device], torch.Tensor]


def launcher(backend: str, problem: Problem, config: Config, pieces: int) -> Runner:
    """The runner. Raises BackendFailedError if a kernel does not compile or load.

    Under ``TRITON_INTERPRET`` there is nothing to compile, and Triton itself runs the kernels.
    """
    if not isinstance(prepare, JITFunction):
        return Interpreted(backend, problem, config, pieces)
    from ..launch.chain import Chain
    from ..launch.launcher import Launcher

    launchers = [Launcher(backend, problem, config, each) for each in compilers(problem, config, pieces)]
    return Chain(launchers, partial(workspace, problem=problem))


def compilers(problem: Problem, config: Config, pieces: int) -> tuple[Any, ...]:
    """What compiles for calls of ``problem``: one for each kernel, in the order they run in."""
    from ..triton.compiling import Form, TritonCompiler

    first = Form(
        prepare,
        partial(_named, prepare.arg_names),
        lambda problem, _config: prepare_constants(problem, pieces),
        prepare_options,
        lambda _problem, _config, call: prepare_grid(call),
    )
    second = Form(
        scan,
        partial(_named, scan.arg_names),
        lambda problem, config: scan_constants(problem, config, pieces),
        scan_options,
        scan_grid,
    )
    return tuple(TritonCompiler(problem, config, form) for form in (first, second))


def _named(names: tuple[str, ...], call: Call, out: torch.Tensor) -> Mapping[str, int | float]:
    """The scalars and strides that a kernel has among its parameters."""
    return {name: value for name, value in numbers(call, out).items() if name in names}


def _allocate(words: int, device: torch.device) -> torch.Tensor:
    return torch.empty(words, dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class Interpreted:
    """Runs the kernels by Triton's own launch, ``kernel[grid](...)``: what the interpreter offers.

    Attributes:
        backend, problem, config: what it was bound to. pieces: bfloat16 that stand for a float32.
        allocate: makes the workspace of a call.
    """

    backend: str
    problem: Problem
    config: Config
    pieces: int
    allocate: Allocate = field(default=_allocate)

    def __call__(self, call: Call) -> torch.Tensor:
        """Raises BackendFailedError if Triton refuses."""
        out = call.out
        if out is None:
            out = torch.empty(call.v.shape, dtype=call.q.dtype, device=call.q.device)
        if call.n == 0 or call.q.shape[1] == 0:
            return out
        tensors = {name: out if name == "out" else getattr(call, tensor) for name, tensor in TENSOR_OF.items()}
        tensors["workspace"] = self.allocate(workspace(call, self.problem) // 4, call.q.device)
        given = tensors | numbers(call, out)
        first = (
            prepare,
            prepare_grid(call),
            prepare_constants(self.problem, self.pieces),
            prepare_options(self.config),
        )
        second = (
            scan,
            scan_grid(self.problem, self.config, call),
            scan_constants(self.problem, self.config, self.pieces),
            scan_options(self.config),
        )
        try:
            for kernel, grid, constants, options in (first, second):
                named = {name: given[name] for name in kernel.arg_names if name in given}
                kernel[grid](**named, **constants, **options)
        except (CompilationError, RuntimeError) as error:
            raise BackendFailedError(
                "fused_sigmoid_gating", self.backend, self.config.label, self.problem.label, "launch", str(error)
            ) from error
        return out
