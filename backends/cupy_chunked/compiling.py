"""Compiling the kernels with NVRTC; how a call lies in their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call
from ..cupy.compiling import FOLDER as SHARED
from ..cupy.compiling import NVRTC_OPTIONS, assembled, cubin, nvrtc_version
from ..launch.compiler import Layout, Variant
from ..launch.cubins import cached, discard, file_of
from ..launch.image import Image
from .arguments import RECORDS_AT, VECTORS, aligned, slots, template
from .overlap import can_overlap
from .specialization import Specialization

__all__ = ["FOLDER", "ChunkedCompiler", "entry", "grid", "overlaps", "source", "sources", "target"]

FOLDER = Path(__file__).parent / "kernels"
#: Blocks along the grid's y axis; beyond, they go on along z.
_GRID_Y = 65535


def sources() -> Sequence[Path]:
    """The kernels' files, those shared with ``cupy`` included."""
    return (*sorted(FOLDER.iterdir()), SHARED / "numbers.cuh", SHARED / "gates.cuh")


@cache
def source(kernel: str) -> str:
    """A kernel with the files it includes in their places."""
    return assembled(FOLDER / f"{entry(kernel)}.cu", FOLDER, SHARED)


def entry(kernel: str) -> str:
    """Its name in its source, and that file's: the scan without outputs is the scan."""
    return "scan" if kernel == "local" else kernel


def grid(kernel: str, specialization: Specialization, call: Call) -> tuple[int, int, int]:
    """Blocks: of the first kernel per chunk and ``heads``, else per tile, value head and sequence or segment."""
    if kernel == "prepare":
        x, rest = call.hv // specialization.heads, slots(call)
    else:
        cut = specialization.cut if kernel in ("local", "scan") else 0
        x, rest = specialization.tiles(kernel) * call.hv, slots(call, cut) if cut else call.n
    return x, min(rest, _GRID_Y), -(-rest // _GRID_Y)


def overlaps(kernel: str, arch: int) -> bool:
    """Whether it may start before the kernel before it in the chain ends; it then waits for what that one leaves it.

    The first does not, so whatever came before the chain has ended when the second begins.
    """
    return kernel != "prepare" and can_overlap(arch)


def target(kernel: str, specialization: Specialization, arch: int) -> str:
    """What a kernel is compiled for: products of four warps are instructions of one architecture alone ("a")."""
    return f"{arch}a" if specialization.group and entry(kernel) == "scan" else str(arch)


@dataclass(frozen=True, slots=True)
class ChunkedCompiler:
    """One of the kernels, one specialisation, one architecture (``arch / 10``)."""

    kernel: str
    specialization: Specialization
    arch: int
    dense: bool

    def layout(self, call: Call) -> Layout:
        block, places = template(call)
        blocks = grid(self.kernel, self.specialization, call) if call.q.shape[1] else (0, 0, 0)
        vectors = [TENSORS.index(name) for name in VECTORS if name == "out" or getattr(call, name) is not None]
        return Layout(block, places, blocks, tuple(vectors), aligned(call), scratch=RECORDS_AT)

    def expected(self) -> Sequence[Variant]:
        """The kernel for packed tensors; other strides are seen when a call is."""
        return (Variant(None, wide=True),) if self.dense else ()

    def image(self, variant: Variant, fresh: bool = False) -> Image:
        special = self.specialization
        options = (
            f"--gpu-architecture=sm_{target(self.kernel, special, self.arch)}",
            *NVRTC_OPTIONS,
            *special.options(self.kernel, variant.wide),
        )
        overlapping = overlaps(self.kernel, self.arch)
        path = file_of("cupy_chunked", (source(self.kernel), str(options), nvrtc_version(), str(overlapping)))
        if fresh:
            discard(path)
        return cached(
            path,
            lambda: Image(
                cubin(source(self.kernel), f"{entry(self.kernel)}.cu", options),
                entry(self.kernel),
                *special.block(self.kernel),
                overlaps=overlapping,
            ),
        )

    def errors(self) -> tuple[type[Exception], ...]:
        return (RuntimeError, ImportError, OSError)  # NVRTC's own error is a RuntimeError
