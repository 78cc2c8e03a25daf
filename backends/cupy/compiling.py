"""Compiling the kernel with NVRTC, through the binding and the library that CuPy brings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ...registry.ops.fused_sigmoid_gating.call import Call
from ..launch.compiler import Layout, Variant
from ..launch.cubins import cached, discard, file_of
from ..launch.image import Image
from .arguments import template
from .specialization import Specialization

__all__ = [
    "FOLDER",
    "NAME",
    "NVRTC_OPTIONS",
    "CupyCompiler",
    "assembled",
    "cubin",
    "grid",
    "nvrtc_version",
    "source",
    "sources",
]

FOLDER = Path(__file__).parent / "kernels"
NAME = "recurrent"

#: Products and sums are fused where the source says fmaf and nowhere else: bits follow from the source alone. Nothing
#: else is given: ``cupy.RawModule`` would add ``-ftz=true``, and a gate of 1e-39 must not become 0.
NVRTC_OPTIONS = ("-std=c++17", "--fmad=false")
_INCLUDE = re.compile(r'#include "(\w+\.cuh)"')
#: Blocks along the grid's y axis, which sequences are laid along; beyond, they go on along z.
_GRID_Y = 65535


def sources() -> Sequence[Path]:
    """The kernel's files."""
    return (FOLDER / f"{NAME}.cu", *sorted(FOLDER.glob("*.cuh")))


@cache
def source() -> str:
    """``recurrent.cu`` with the files it includes in their places."""
    return assembled(FOLDER / f"{NAME}.cu", FOLDER)


def assembled(main: Path, *folders: Path) -> str:
    """A CUDA source with the files it includes, from the first folder that has them: one text, which names the kernel
    on disk.
    """
    parts = []
    for number, line in enumerate(main.read_text().splitlines(), start=1):
        match = _INCLUDE.fullmatch(line)
        if match is None:
            parts.append(line)
            continue
        file = next(folder / match[1] for folder in folders if (folder / match[1]).exists())
        body = file.read_text().replace("#pragma once\n", "\n")
        parts.append(f'#line 1 "{match[1]}"\n{body}#line {number + 1} "{main.name}"')
    return "\n".join(parts) + "\n"


def grid(specialization: Specialization, n: int, hv: int) -> tuple[int, int, int]:
    """Blocks for ``n`` sequences; see ``kernels/recurrent.cu``."""
    return specialization.tiles * hv, min(n, _GRID_Y), -(-n // _GRID_Y)


@dataclass(frozen=True, slots=True)
class CupyCompiler:
    """One specialisation for one architecture (``arch / 10``). One machine code serves all its calls."""

    specialization: Specialization
    arch: int

    def layout(self, call: Call) -> Layout:
        block, places = template(call)
        blocks = grid(self.specialization, call.n, call.hv) if call.q.shape[1] else (0, 0, 0)
        return Layout(block, places, blocks)

    def expected(self) -> Sequence[Variant]:
        return (Variant(None, wide=True),)

    def image(self, variant: Variant, fresh: bool = False) -> Image:
        options = (f"--gpu-architecture=sm_{self.arch}", *NVRTC_OPTIONS, *self.specialization.options())
        path = file_of("cupy", (source(), str(options), nvrtc_version()))
        if fresh:
            discard(path)
        return cached(path, lambda: Image(cubin(source(), f"{NAME}.cu", options), NAME, self.specialization.threads))

    def errors(self) -> tuple[type[Exception], ...]:
        return (RuntimeError, ImportError, OSError)  # NVRTC's own error is a RuntimeError


def _nvrtc() -> Any:
    return import_module("cupy_backends.cuda.libs.nvrtc")


def nvrtc_version() -> str:
    return f"NVRTC {_nvrtc().getVersion()}"


def cubin(text: str, name: str, options: Sequence[str]) -> bytes:
    """Machine code of a source. Raises RuntimeError with the compiler's log."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(text, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program)) + b"\0"  # CuPy strips the last byte, as if this were a string
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
