"""``cupy``: the op in CUDA C++ templates, compiled by NVRTC through CuPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from ...registry.backend import Backend, Config, Runner
from ...registry.decision import Accepted, RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .. import launch
from ..launch import ahead
from .configs import configs
from .specialization import MAX_DIM

__all__ = ["Cupy"]

_DTYPES = ("float32", "bfloat16", "float16")


class Cupy(Backend):
    """The recurrence with the state in registers, one launch per call. All configs give the same bits."""

    op: ClassVar[str] = "fused_sigmoid_gating"
    name: ClassVar[str] = "cupy"
    provenance: ClassVar[str] = "cupy"
    requires: ClassVar[tuple[str, ...]] = ("cupy",)
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "batch_invariant", "capture_safe"})
    priority: ClassVar[int] = 80

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cuda":
            return Rejected(RejectCode.DEVICE, f"runs on NVIDIA GPUs, the tensors are on {problem.device}")
        if problem.arch < 80:
            return Rejected(
                RejectCode.ARCH, f"needs compute capability 8.0 (bfloat16 rounding), this is {problem.arch}"
            )
        states = (problem.state_dtype or "float32", problem.intermediate_dtype or "float32")
        for what, dtype in (("q, k, v", problem.io_dtype), ("states", states[0]), ("intermediate states", states[1])):
            if dtype not in _DTYPES:
                return Rejected(RejectCode.DTYPE, f"computes in float32: {what} in {dtype} would lose precision")
        if problem.grad:
            return Rejected(RejectCode.GRAD, "not differentiable")
        if max(problem.k, problem.v) > MAX_DIM:
            return Rejected(RejectCode.SHAPE, f"K and V up to {MAX_DIM}, given {problem.k} and {problem.v}")
        return Accepted()

    def configs(self, problem: Problem) -> Sequence[Config]:
        return configs(problem)

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .launcher import launcher

        return launcher(self.name, problem, config)

    def compile(self, problem: Problem, config: Config) -> None:
        from .launcher import compiler

        ahead.compile_expected(self.name, problem, config, compiler(problem, config))

    def sources(self) -> Sequence[Path]:
        folder = Path(__file__).parent
        names = ("arguments.py", "backend.py", "compiling.py", "launcher.py", "specialization.py")
        return (*(folder / name for name in names), *sorted((folder / "kernels").iterdir()), *launch.sources())

    def shared_sources(self) -> Sequence[Path]:
        return launch.sources()

    def toolchain(self) -> Mapping[str, str]:
        found = {}
        # The wheel is named after the CUDA version it is built for.
        for name in ("cupy", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc"):
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        return found
