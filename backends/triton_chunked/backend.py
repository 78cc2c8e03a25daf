"""``triton_chunked``: the chunkwise form on tensor cores, in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...registry.backend import Config, Runner
from ...registry.decision import RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .. import launch
from ..launch import ahead
from ..triton.backend import Triton
from .arguments import CHUNK
from .configs import configs

__all__ = ["TritonChunked"]

#: Tokens of the longest sequence up to which a chunk never pays.
_NEVER = 16
_SOURCES = tuple(f"{name}.py" for name in "arguments backend chunks configs launcher prepare products scan".split())
#: Architecture from which Triton keeps products in tensor memory: of KDA's there are more than it holds.
_TENSOR_MEMORY = 100
#: Of the recurrent kernel, what this one shares.
_SHARED = ("arguments.py", "compiling.py", "gates.py")


class TritonChunked(Triton):
    """Chunks of 64 tokens: what does not need the state in one launch, in parallel; the state's way in another.

    One decay per head (GDN) or per key (KDA). Operands of products are split into bfloat16 that add up to them, so the
    error is that of float32 arithmetic. Reads no lengths on the host and compiles nothing per length.
    """

    name: ClassVar[str] = "triton_chunked"
    priority: ClassVar[int] = 35  # below the recurrent ones: where it pays has not been measured; tuning finds it
    accuracy: ClassVar[str] = "chunked"
    #: bfloat16 that stand for one float32.
    pieces: ClassVar[int] = 3

    def check(self, problem: Problem) -> Verdict:
        if problem.intermediates != "none":
            return Rejected(RejectCode.FEATURE, "a chunk does not form the states after each of its tokens")
        if problem.is_kda and problem.arch >= _TENSOR_MEMORY:
            return Rejected(
                RejectCode.ARCH,
                f"Triton compiles its products of decays by key (KDA) into a trap for sm_{problem.arch}",
            )
        return super().check(problem)

    def configs(self, problem: Problem) -> Sequence[Config]:
        return configs(problem)

    def hopeless(self, problem: Problem) -> str | None:
        longest = problem.profile.longest
        if longest is not None and longest <= _NEVER:
            return f"at most {longest} tokens a sequence, where a chunk of {CHUNK} takes longer than they do one by one"
        return None

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .launcher import launcher

        return launcher(self.name, problem, config, self.pieces)

    def compile(self, problem: Problem, config: Config) -> None:
        from .launcher import compilers

        for compiler in compilers(problem, config, self.pieces):
            ahead.compile_expected(self.name, problem, config, compiler)

    def sources(self) -> Sequence[Path]:
        here, shared = Path(__file__).parent, Path(__file__).parents[1] / "triton"
        return (*(here / name for name in _SOURCES), *(shared / name for name in _SHARED), *launch.sources())

    def shared_sources(self) -> Sequence[Path]:
        return launch.sources()
