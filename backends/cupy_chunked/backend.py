"""``cupy_chunked``: the chunkwise form on tensor cores, in CUDA C++ compiled by NVRTC through CuPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ...registry.backend import Backend, Config, Runner
from ...registry.decision import Accepted, RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .. import launch
from ..cupy.backend import Cupy
from ..launch import ahead
from .arguments import CHUNK
from .configs import configs, cut_configs, shared_limit

__all__ = ["CupyChunked", "CupyChunkedBf16", "CupyCut", "CupyCutBf16"]

_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_HEAD = 256
#: Tokens of the longest sequence from which the recurrent form is taken to be slower (0.2 us a token against 20 us for
#: the first chunks, on an H100).
_PAYS_FROM = 128
#: Columns of V of a block, and tokens from which three passes instead of two may pay.
_COLUMNS, _CUT_FROM = 64, 1024
#: Tokens per block from which sequences are cut unasked: the fewer blocks, the more of the chip whole ones leave idle.
_CUT_PER_BLOCK = 64
#: Blocks that fill it.
_MANY_BLOCKS = 132
#: Tokens of the longest sequence up to which a chunk never pays.
_NEVER = 16


class CupyChunked(Backend):
    """Chunks of 64 tokens: what does not need the state in one launch, in parallel; the state's way in another.

    Every operand of a product that bfloat16 cannot hold is split into three such numbers that add up to it (float16
    into two): the tensor cores give what float32 arithmetic would. Reads no lengths on the host and compiles nothing
    per length.
    """

    op: ClassVar[str] = "fused_sigmoid_gating"
    name: ClassVar[str] = "cupy_chunked"
    provenance: ClassVar[str] = "cupy"
    requires: ClassVar[tuple[str, ...]] = ("cupy",)
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "batch_invariant", "capture_safe"})
    priority: ClassVar[int] = 85
    accuracy: ClassVar[str] = "chunked"
    #: bfloat16 that stand for one float32.
    pieces: ClassVar[int] = 3

    def rank(self, problem: Problem) -> int:
        """Above the recurrent backends where some sequence is known to be long, below them elsewhere."""
        longest = problem.profile.longest
        return self.priority if longest is not None and longest >= _PAYS_FROM else 40

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cuda":
            return Rejected(RejectCode.DEVICE, f"runs on NVIDIA GPUs, the tensors are on {problem.device}")
        if problem.arch < 80:
            return Rejected(
                RejectCode.ARCH, f"needs compute capability 8.0 (bfloat16 products), this is {problem.arch}"
            )
        for what, dtype in (("q, k, v", problem.io_dtype), ("states", problem.state_dtype or "float32")):
            if dtype not in _DTYPES:
                return Rejected(RejectCode.DTYPE, f"computes in float32: {what} in {dtype} would lose precision")
        if problem.grad:
            return Rejected(RejectCode.GRAD, "not differentiable")
        if problem.is_kda:
            return Rejected(
                RejectCode.FEATURE, "decays differ by key channel (KDA): a chunk's products are formed with one"
            )
        if problem.intermediates != "none":
            return Rejected(RejectCode.FEATURE, "a chunk does not form the states after each of its tokens")
        if max(problem.k, problem.v) > _LARGEST_HEAD:
            return Rejected(RejectCode.SHAPE, f"K and V up to {_LARGEST_HEAD}, given {problem.k} and {problem.v}")
        if not self.configs(problem):
            most = shared_limit(problem.arch) >> 10
            what = f"a chunk of K={problem.k} in {problem.io_dtype}"
            return Rejected(RejectCode.SHAPE, f"{what} does not fit the {most} KiB of shared memory")
        return Accepted()

    def configs(self, problem: Problem) -> Sequence[Config]:
        return configs(problem, self.pieces)

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
        here, shared = Path(__file__).parent, Path(__file__).parents[1] / "cupy"
        names = ("arguments.py", "backend.py", "compiling.py", "launcher.py", "overlap.py", "specialization.py")
        kernels = (
            *sorted((here / "kernels").iterdir()),
            *(shared / "kernels" / name for name in ("numbers.cuh", "gates.cuh")),
        )
        return (*(here / name for name in names), *kernels, shared / "compiling.py", *launch.sources())

    def shared_sources(self) -> Sequence[Path]:
        return launch.sources()

    def toolchain(self) -> Mapping[str, str]:
        return Cupy().toolchain()


class CupyCut(CupyChunked):
    """Sequences cut into segments that are worked on side by side, for prompts with too few heads to fill the chip.

    Three passes: what each segment does to a state, whatever the state (K columns more), the states that segments start
    from, and then the outputs. Bits depend on where a sequence is cut, and that on the batch's profile.
    """

    name: ClassVar[str] = "cupy_cut"
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "capture_safe"})
    cuts: ClassVar[bool] = True
    priority: ClassVar[int] = 84
    #: Most blocks, and fewest tokens, with which three passes are the first choice.
    few_blocks: ClassVar[int] = 64
    cut_from: ClassVar[int] = _CUT_FROM

    def rank(self, problem: Problem) -> int:
        """First where heads are few and some sequence is known to be long; else below all others on a GPU."""
        return self.priority + 3 if self._pays(problem) else 30

    def configs(self, problem: Problem) -> Sequence[Config]:
        return cut_configs(problem, self.pieces)

    def hopeless(self, problem: Problem) -> str | None:
        longest = problem.profile.longest
        if longest is not None and longest < _CUT_FROM:
            return f"at most {longest} tokens a sequence, too few to be worth three passes"
        blocks = None if longest is None else _blocks(problem, longest)
        if blocks is not None and blocks > _MANY_BLOCKS:
            return f"{blocks} blocks of long sequences fill the multiprocessors without any being cut"
        return None

    def _pays(self, problem: Problem) -> bool:
        """Whether whole sequences leave much of the chip idle for long: by few blocks, and many chunks."""
        longest = problem.profile.longest
        if longest is None or longest < self.cut_from:
            return False
        blocks = _blocks(problem, longest)
        return blocks <= self.few_blocks and longest >= _CUT_PER_BLOCK * blocks


def _blocks(problem: Problem, longest: int) -> int:
    """Blocks of the scan that work on sequences about as long as the longest: there are at most tokens / longest."""
    return max(1, problem.profile.tokens // longest) * problem.hv * -(-problem.v // _COLUMNS)


class CupyChunkedBf16(CupyChunked):
    """The same kernels with every operand of a product rounded to bfloat16, as other libraries' are; sums are float32.

    A third of the products, and about twice the error of rounding the outputs (``docs/performance/prefill.md``). Runs
    where it is named, or where rounded operands are allowed (``registry.use(op, accuracy="rounded")``); never unasked.
    """

    name: ClassVar[str] = "cupy_chunked_bf16"
    priority: ClassVar[int] = 88
    accuracy: ClassVar[str] = "rounded"
    pieces: ClassVar[int] = 1

    def check(self, problem: Problem) -> Verdict:
        verdict = super().check(problem)
        return _bfloat16_alone(problem) if verdict else verdict


def _bfloat16_alone(problem: Problem) -> Verdict:
    if problem.io_dtype != "bfloat16":
        return Rejected(RejectCode.DTYPE, f"takes q and k as bfloat16: {problem.io_dtype} would be rounded")
    return Accepted()


class CupyCutBf16(CupyCut):
    """``cupy_cut`` with operands rounded like those of ``cupy_chunked_bf16``."""

    name: ClassVar[str] = "cupy_cut_bf16"
    priority: ClassVar[int] = 86
    accuracy: ClassVar[str] = "rounded"
    # The pass that is saved takes half as long.
    few_blocks: ClassVar[int] = 32
    cut_from: ClassVar[int] = 2048
    pieces: ClassVar[int] = 1

    def check(self, problem: Problem) -> Verdict:
        verdict = super().check(problem)
        return _bfloat16_alone(problem) if verdict else verdict
