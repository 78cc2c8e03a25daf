"""``triton``: the op's recurrent form in Triton, one pass over the state per token, the state in registers."""

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
from .configs import configs

__all__ = ["Triton"]

_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_HEAD = 256
#: What decides the kernel's code and its launch; the compile report and benchmarks do not.
_SOURCES = (
    "arguments.py",
    "backend.py",
    "compiling.py",
    "configs.py",
    "gates.py",
    "kernel.py",
    "launcher.py",
    "tiles.py",
)


class Triton(Backend):
    """Every argument of the contract on CUDA tensors, for heads of up to 256; see ``configs`` for the settings.

    The order of every sum is written in the source, so results do not depend on the tile, the warps, the state's
    layout or strides, on the other sequences of a batch, or on where a sequence is cut.
    """

    op: ClassVar[str] = "fused_sigmoid_gating"
    name: ClassVar[str] = "triton"
    provenance: ClassVar[str] = "triton"
    requires: ClassVar[tuple[str, ...]] = ("triton",)
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "batch_invariant", "capture_safe"})
    priority: ClassVar[int] = 70

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cuda":
            return Rejected(RejectCode.DEVICE, f"runs on CUDA GPUs, the tensors are on {problem.device}")
        if problem.arch < 80:
            return Rejected(RejectCode.ARCH, f"needs compute capability 8.0, the GPU has {problem.arch / 10:.1f}")
        states = (problem.state_dtype or "float32", problem.intermediate_dtype or "float32")
        gates = (problem.a_dtype, problem.b_dtype, problem.A_log_dtype, problem.dt_bias_dtype)
        for what, dtypes in (("q, k, v", (problem.io_dtype,)), ("states", states), ("gates", gates)):
            for dtype in dtypes:
                if dtype not in _DTYPES:
                    return Rejected(RejectCode.DTYPE, f"computes in float32: {what} in {dtype} would lose precision")
        if problem.grad:
            return Rejected(RejectCode.GRAD, "not differentiable")
        if max(problem.k, problem.v) > _LARGEST_HEAD:
            return Rejected(RejectCode.SHAPE, f"heads of up to {_LARGEST_HEAD}, given K={problem.k}, V={problem.v}")
        return Accepted()

    def configs(self, problem: Problem) -> Sequence[Config]:
        return configs(problem)

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .launcher import launcher

        return launcher(self.name, problem, config)

    def compile(self, problem: Problem, config: Config) -> None:
        from .compiling import TritonCompiler

        ahead.compile_expected(self.name, problem, config, TritonCompiler(problem, config))

    def sources(self) -> Sequence[Path]:
        folder = Path(__file__).parent
        return (*(folder / name for name in _SOURCES), *launch.sources())

    def shared_sources(self) -> Sequence[Path]:
        return launch.sources()

    def toolchain(self) -> Mapping[str, str]:
        return {"triton": metadata.version("triton")}
