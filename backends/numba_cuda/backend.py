"""``numba_cuda``: the op as a Numba CUDA kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from ...registry.backend import Backend, Config, Runner
from ...registry.decision import Accepted, RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .. import launch
from ..launch import ahead
from .space import configs_for

__all__ = ["NumbaCuda"]

_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_DIM = 256
_OLDEST = 80  # the first architecture that rounds to bfloat16 in one instruction


class NumbaCuda(Backend):
    """Every argument of the contract, in the recurrent form: one pass over the state per token.

    Results do not depend on the config, bit for bit: the order of every sum is a function of K alone.
    """

    op: ClassVar[str] = "fused_sigmoid_gating"
    name: ClassVar[str] = "numba_cuda"
    provenance: ClassVar[str] = "numba_cuda"
    requires: ClassVar[tuple[str, ...]] = ("numba_cuda",)
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "batch_invariant", "capture_safe"})
    priority: ClassVar[int] = 60

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cuda":
            return Rejected(RejectCode.DEVICE, f"runs on CUDA devices, the tensors are on {problem.device}")
        if problem.arch < _OLDEST:
            return Rejected(RejectCode.ARCH, f"needs sm_{_OLDEST} or newer, the device is sm_{problem.arch}")
        states = (problem.state_dtype or "float32", problem.intermediate_dtype or "float32")
        for what, dtype in (("q, k, v", problem.io_dtype), ("states", states[0]), ("intermediate states", states[1])):
            if dtype not in _DTYPES:
                return Rejected(RejectCode.DTYPE, f"computes in float32: {what} in {dtype} would lose precision")
        gates = (problem.a_dtype, problem.b_dtype, problem.A_log_dtype, problem.dt_bias_dtype)
        if any(dtype not in _DTYPES for dtype in gates):
            return Rejected(RejectCode.DTYPE, "computes in float32: float64 gates would lose precision")
        if problem.grad:
            return Rejected(RejectCode.GRAD, "not differentiable")
        if max(problem.k, problem.v) > _LARGEST_DIM:
            return Rejected(RejectCode.SHAPE, f"K and V up to {_LARGEST_DIM}, given K={problem.k} and V={problem.v}")
        return Accepted()

    def configs(self, problem: Problem) -> Sequence[Config]:
        return configs_for(problem)

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .launch import launcher

        return launcher(self.name, problem, config)

    def compile(self, problem: Problem, config: Config) -> None:
        from .launch import NumbaCompiler

        ahead.compile_expected(self.name, problem, config, NumbaCompiler.of(problem, config))

    def sources(self) -> Sequence[Path]:
        return (*sorted(Path(__file__).parent.glob("*.py")), *launch.sources())

    def shared_sources(self) -> Sequence[Path]:
        return launch.sources()

    def toolchain(self) -> Mapping[str, str]:
        return {name: metadata.version(name) for name in ("numba", "numba-cuda", "cuda-core")}
