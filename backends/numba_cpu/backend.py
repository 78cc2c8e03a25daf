"""``numba_cpu``: the op on CPU tensors, compiled by Numba, one pass over the state per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from ...registry.backend import Backend, Config, Runner
from ...registry.decision import Accepted, RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem

__all__ = ["NumbaCpu"]

_DTYPES = ("float32", "bfloat16", "float16")
_TILES = (16, 32, 64, 128)
#: Tokens per sequence up to which moving the state costs more than computing on it.
_STREAMING = 8


class NumbaCpu(Backend):
    """Every argument of the contract on CPU tensors, strided inputs and token trees included.

    Config ``v_tile``: columns of the state worked on at a time; it changes speed, never a bit of the result.
    """

    op: ClassVar[str] = "fused_sigmoid_gating"
    name: ClassVar[str] = "numba_cpu"
    provenance: ClassVar[str] = "numba"
    requires: ClassVar[tuple[str, ...]] = ("numba",)
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "batch_invariant"})
    priority: ClassVar[int] = 50

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cpu":
            return Rejected(RejectCode.DEVICE, f"runs on the CPU, the tensors are on {problem.device}")
        states = (problem.state_dtype or "float32", problem.intermediate_dtype or "float32")
        for what, dtype in (("q, k, v", problem.io_dtype), ("states", states[0]), ("intermediate states", states[1])):
            if dtype not in _DTYPES:
                return Rejected(RejectCode.DTYPE, f"computes in float32: {what} in {dtype} would lose precision")
        if problem.grad:
            return Rejected(RejectCode.GRAD, "not differentiable")
        return Accepted()

    def configs(self, problem: Problem) -> Sequence[Config]:
        # A few tokens: states stream through, and wide tiles read whole rows. Many: the tile should stay in L1.
        longest = problem.profile.longest
        best = 128 if longest is not None and longest <= _STREAMING else 32
        useful = [width for width in _TILES if width < 2 * problem.v or width == _TILES[0]]
        best = min(best, useful[-1])
        return tuple(Config.of(v_tile=w) for w in sorted(useful, key=lambda w: (w != best, w)))

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .kernel import kernel
        from .launcher import Launcher

        return Launcher(kernel(self.fingerprint()), int(config["v_tile"]))

    def sources(self) -> Sequence[Path]:
        return tuple(sorted(Path(__file__).parent.glob("*.py")))

    def toolchain(self) -> Mapping[str, str]:
        return {name: metadata.version(name) for name in ("numba", "llvmlite")}
