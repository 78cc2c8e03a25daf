"""Launching compiled variants on torch tensors.

Numba's own launch unpacks every tensor into an array record, which costs 100 us and more, and reading
``__cuda_array_interface__`` synchronises. Here Numba compiles and the prepared launcher launches.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ..launch.compiler import Layout, Variant
from ..launch.cubins import cached, discard, file_of
from ..launch.image import Image
from ..launch.launcher import Launcher
from . import variant as kernels
from .backend import NumbaCuda
from .compile import compile_variant
from .parameters import FLOATS, INTEGERS, Packer, floats, is_aligned, packer
from .places import grid

__all__ = ["NumbaCompiler", "launcher"]

_BLOCK = struct.Struct(f"={INTEGERS}q{len(FLOATS)}f")
_WORD = 8
#: Modules that no kernel depends on.
_APART = frozenset({"launch.py", "resources.py", "space.py"})


def launcher(backend: str, problem: Problem, config: Config) -> Launcher:
    """The runner on GPUs. Raises BackendFailedError if a kernel does not compile or load."""
    return Launcher(backend, problem, config, NumbaCompiler.of(problem, config))


@cache
def _sources() -> str:
    """Of everything that decides a kernel's code beside its variant and the architecture."""
    backend = NumbaCuda()
    files = [path for path in backend.sources() if path.name not in _APART and path.parent.name == "numba_cuda"]
    return fingerprint_files(files, backend.toolchain())


@dataclass(frozen=True, slots=True)
class NumbaCompiler:
    """The kernels of one problem and config: one that accesses states 16 bytes at a time, and one that need not."""

    variant: kernels.Variant
    narrow: kernels.Variant
    packer: Packer
    arch: int

    @classmethod
    def of(cls, problem: Problem, config: Config) -> NumbaCompiler:
        wide, narrow = (kernels.Variant.of(problem, config, wide) for wide in (True, False))
        return cls(wide, narrow, packer(wide), problem.arch)

    def layout(self, call: Call) -> Layout:
        if call.out is None:
            call = call.replace(out=torch.empty(call.v.shape, dtype=call.q.dtype, device="meta"))
        words = [0] * INTEGERS
        self.packer.fill(call, words)
        given = [(at, name) for at, name in self.packer.pointers]
        for at, _ in given:
            words[at] = 0
        blocks = grid(self.variant, call.n, call.hv) if call.tokens else (0, 0, 0)
        vectors = (self.variant.wide_k or self.variant.wide_v) and is_aligned(words)
        states = [TENSORS.index(name) for _, name in given if name in ("pool", "intermediates")] if vectors else []
        return Layout(
            block=_BLOCK.pack(*map(int, words), *floats(call)),
            places=tuple((TENSORS.index(name), _WORD * at) for at, name in given),
            grid=blocks,
            vectors=tuple(states),
            wide=vectors,
        )

    def expected(self) -> Sequence[Variant]:
        if self.variant == self.narrow or not (self.variant.wide_k or self.variant.wide_v):
            return (Variant(None, wide=False),)
        # Contiguous tensors of torch are aligned. Views need not be, and a capture is no time to compile.
        return (Variant(None, wide=True), *(() if self.variant.strides == "dense" else (Variant(None, wide=False),)))

    def image(self, variant: Variant, fresh: bool = False) -> Image:
        which = self.variant if variant.wide else self.narrow
        path = file_of("numba_cuda", (repr(which), f"sm_{self.arch}", _sources()))
        if fresh:
            discard(path)

        def make() -> Image:
            made = compile_variant(which, self.arch)
            return Image(made.code, made.entry, which.threads)

        return cached(path, make)

    def errors(self) -> tuple[type[Exception], ...]:
        """What Numba, NVVM and the linker raise for a kernel they cannot build."""
        from cuda.bindings.nvjitlink import nvJitLinkError
        from numba.core.errors import NumbaError
        from numba.cuda.cudadrv.error import CudaDriverError, NvvmError

        return NumbaError, NvvmError, CudaDriverError, nvJitLinkError, RuntimeError, OSError
