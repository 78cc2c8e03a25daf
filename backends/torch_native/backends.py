"""The op in plain torch, three times: to be read, to be a fair baseline, and to be fast on prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from ...registry.backend import Backend, Config, Runner
from ...registry.decision import Accepted, RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .budget import largest_block

__all__ = ["TorchChunked", "TorchReference", "TorchVectorized"]

_HOST_LENGTHS = "needs the lengths on the host: pass cu_seqlens as a SequenceLayout"
_OP = Path(__file__).parents[2] / "registry" / "ops" / "fused_sigmoid_gating"


def _distinct(sizes: Sequence[int], problem: Problem) -> tuple[int, ...]:
    """The block sizes (KiB) below which this problem's own size cuts blocks anyway; at least the first."""
    io, state = (4 if d == "float32" else 8 if d == "float64" else 2 for d in (problem.io_dtype, problem.state_dtype))
    tokens, n = problem.profile.tokens, problem.profile.n  # a bucket's largest, with an output and twice the slots
    held = 2 * io * tokens * (problem.h * problem.k + problem.hv * problem.v)
    if problem.state_dtype is not None:
        held += 2 * state * n * problem.hv * problem.k * problem.v
    return tuple(kib for kib in sizes if kib << 10 <= largest_block(held)) or tuple(sizes[:1])


class _TorchNative(Backend):
    """What the three have in common."""

    op: ClassVar[str] = "fused_sigmoid_gating"
    provenance: ClassVar[str] = "torch"
    requires: ClassVar[tuple[str, ...]] = ("torch",)

    def sources(self) -> Sequence[Path]:
        here = sorted(Path(__file__).parent.glob("*.py"))
        return (*here, _OP / "gates.py", _OP / "call.py")

    def toolchain(self) -> Mapping[str, str]:
        return {"torch": metadata.version("torch")}


class TorchReference(_TorchNative):
    """Token by token, differentiable in every float input; the last resort. Reads lengths and slots on the host."""

    name: ClassVar[str] = "torch_reference"
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "differentiable", "batch_invariant"})
    priority: ClassVar[int] = 0

    def check(self, problem: Problem) -> Verdict:
        if not problem.lengths_on_host:
            return Rejected(RejectCode.FEATURE, _HOST_LENGTHS)
        if problem.mode == "graph":
            return Rejected(RejectCode.MODE, "reads slot numbers on the host, which a CUDA graph cannot hold")
        return Accepted("waits for the device to read the slots" if problem.device == "cuda" else "")

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .reference import run_reference

        return run_reference


class TorchVectorized(_TorchNative):
    """All sequences and value heads of a step at once; every argument, on CPU and CUDA, lengths known or not.

    Config ``block_kib``: KiB of states worked on at a time. On a CPU they should stay in the last-level cache
    beside the pool's; a GPU wants all its units busy.
    """

    name: ClassVar[str] = "torch_vectorized"
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable"})
    priority: ClassVar[int] = 20

    def check(self, problem: Problem) -> Verdict:
        if problem.grad:
            return Rejected(RejectCode.GRAD, "updates its states in place: not differentiable")
        if not problem.lengths_on_host and problem.profile.longest is None:
            return Accepted("runs T masked steps: pass a SequenceLayout, or at least max_seqlen")
        return Accepted()

    def configs(self, problem: Problem) -> Sequence[Config]:
        sizes = (2048, 4096, 1024, 8192) if problem.device == "cpu" else (65536, 16384, 262144)
        return tuple(Config.of(block_kib=kib) for kib in _distinct(sizes, problem))

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .vectorized import run_vectorized

        return partial(run_vectorized, block_kib=int(config["block_kib"]))


class TorchChunked(_TorchNative):
    """The chunkwise form on matrix products, for prompts and for training; differentiable in every float input.

    Config ``chunk``: tokens per chunk; ``block_kib``: KiB worked on at a time (without autograd, which keeps
    everything it needs for the backward pass).
    """

    name: ClassVar[str] = "torch_chunked"
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable", "differentiable"})
    priority: ClassVar[int] = 30
    accuracy: ClassVar[str] = "chunked"

    def rank(self, problem: Problem) -> int:
        """Below ``torch_vectorized`` where the sequences are too short for a chunk to pay."""
        longest = problem.profile.longest
        return self.priority if longest is None or longest > 4 else TorchVectorized.priority - 1

    def check(self, problem: Problem) -> Verdict:
        if not problem.lengths_on_host:
            return Rejected(RejectCode.FEATURE, _HOST_LENGTHS)
        if problem.intermediates != "none":
            return Rejected(RejectCode.FEATURE, "a chunk does not form the states after each of its tokens")
        return Accepted()

    def configs(self, problem: Problem) -> Sequence[Config]:
        on_cpu = problem.device == "cpu"
        sizes = _distinct((4096, 8192, 2048) if on_cpu else (65536, 262144), problem)
        chunks: tuple[int, ...] = (32, 64, 128, 16) if on_cpu else (64, 32, 128, 16)
        longest = problem.profile.longest
        if longest is not None:
            # A chunk longer than every sequence runs as the shortest power of two that holds one: the same as
            # the next smaller config.
            chunks = tuple(c for c in chunks if c == 16 or c < 2 * longest)
        return tuple(Config.of(chunk=c, block_kib=kib) for kib in sizes for c in chunks)

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .chunked import run_chunked
        from .chunked_grad import run_chunked_grad

        chunk = int(config["chunk"])
        if problem.grad:
            return partial(run_chunked_grad, chunk=chunk)
        return partial(run_chunked, chunk=chunk, block_kib=int(config["block_kib"]))
