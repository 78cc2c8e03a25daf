"""The chunked CUDA C++ backends on CPU tensors, their kernels run by the engine."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ...backends.cupy.arguments import filled
from ...backends.cupy_chunked.arguments import RECORDS_AT, VECTORS, aligned, template, workspace
from ...backends.cupy_chunked.backend import CupyChunked, CupyChunkedBf16, CupyCut, CupyCutBf16
from ...backends.cupy_chunked.compiling import entry, grid, overlaps, source
from ...backends.cupy_chunked.specialization import Specialization
from ...registry.backend import Backend, Config, Runner
from ...registry.decision import RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .engine import CudaOnCpu, watch_also
from .raw_kernel import CpuRawKernel

__all__ = [
    "CupyChunkedBf16OnCpu",
    "CupyChunkedOnCpu",
    "CupyCutBf16OnCpu",
    "CupyCutOnCpu",
    "load",
    "load_bf16",
    "load_cut",
    "load_cut_bf16",
]

#: Of the GPU that kernels are shown.
_ARCH = 90


def load() -> tuple[Backend, CudaOnCpu]:
    """The backend inside the engine, and the engine."""
    return CupyChunkedOnCpu(), CudaOnCpu()


def load_bf16() -> tuple[Backend, CudaOnCpu]:
    """The same with operands rounded."""
    return CupyChunkedBf16OnCpu(), CudaOnCpu()


def load_cut() -> tuple[Backend, CudaOnCpu]:
    """The one that cuts sequences into segments."""
    return CupyCutOnCpu(), CudaOnCpu()


def load_cut_bf16() -> tuple[Backend, CudaOnCpu]:
    """The same with operands rounded."""
    return CupyCutBf16OnCpu(), CudaOnCpu()


class _OnCpu(CupyChunked):
    """A chunked backend's predicate, configs, argument packing, grids and kernel sources, on the CPU."""

    requires: ClassVar[tuple[str, ...]] = ()

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cpu":
            return Rejected(RejectCode.DEVICE, f"the engine runs CPU tensors, these are on {problem.device}")
        return super().check(_on_gpu(problem))

    def configs(self, problem: Problem) -> Sequence[Config]:
        return super().configs(_on_gpu(problem))

    def bind(self, problem: Problem, config: Config) -> Runner:
        return _Launches(Specialization.of(_on_gpu(problem), config, self.pieces))

    def sources(self) -> Sequence[Path]:
        return (*super().sources(), *sorted(p for p in Path(__file__).parent.rglob("*") if p.is_file()))

    def toolchain(self) -> Mapping[str, str]:
        return {}


class CupyChunkedOnCpu(_OnCpu):
    """``cupy_chunked`` on the CPU."""


class CupyChunkedBf16OnCpu(_OnCpu, CupyChunkedBf16):
    """``cupy_chunked_bf16`` on the CPU."""


class CupyCutOnCpu(_OnCpu, CupyCut):
    """``cupy_cut`` on the CPU."""


class CupyCutBf16OnCpu(_OnCpu, CupyCutBf16):
    """``cupy_cut_bf16`` on the CPU."""


@dataclass(frozen=True, slots=True)
class _Launches:
    """The launches of a call, with a GPU's arguments and grids. The workspace begins as NaN."""

    specialization: Specialization

    def __call__(self, call: Call) -> torch.Tensor:
        out = call.out
        if out is None:
            out = torch.empty(call.v.shape, dtype=call.q.dtype)
            call = call.replace(out=out)
        if call.n == 0 or call.q.shape[1] == 0:
            return out
        special = self.specialization
        memory = torch.full((workspace(call, special.pieces, special.cut),), 0xFF, dtype=torch.uint8)
        words = filled(call, *template(call))
        struct.pack_into("=q", words, RECORDS_AT, memory.data_ptr())
        argument = np.frombuffer(words, np.dtype((np.void, len(words))))
        wide = aligned(call) and all(t is None or t.data_ptr() % 16 == 0 for t in (getattr(call, v) for v in VECTORS))
        with watch_also("workspace", memory):
            for kernel in special.kernels:
                threads, shared = special.block(kernel)
                launch, beside = _kernel(kernel, special, wide), overlaps(kernel, _ARCH)
                launch(grid(kernel, special, call), (threads, 1, 1), (argument,), shared, overlaps=beside)
        return out


@cache
def _kernel(name: str, specialization: Specialization, wide: bool) -> CpuRawKernel:
    return CpuRawKernel(source(name), entry(name), specialization.options(name, wide))


def _on_gpu(problem: Problem) -> Problem:
    return replace(problem, device="cuda", arch=_ARCH)
