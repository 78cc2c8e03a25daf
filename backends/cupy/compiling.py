"""Compiling the kernel with NVRTC through CuPy, and launching it on torch's current stream."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .specialization import Specialization

__all__ = ["FOLDER", "NAME", "NVRTC_OPTIONS", "GpuKernel", "compiled", "source", "sources"]

FOLDER = Path(__file__).parent / "kernels"
NAME = "recurrent"

#: Products and sums are fused where the source says fmaf and nowhere else: bits follow from the source alone.
NVRTC_OPTIONS = ("-std=c++17", "--fmad=false")
_INCLUDE = re.compile(r'#include "(\w+\.cuh)"')


def sources() -> Sequence[Path]:
    """The kernel's files."""
    return (FOLDER / f"{NAME}.cu", *sorted(FOLDER.glob("*.cuh")))


@cache
def source() -> str:
    """``recurrent.cu`` with the files it includes in their places: one text, and so one key for CuPy's own cache,
    which does not look into included files.
    """
    main = f"{NAME}.cu"
    parts = []
    for number, line in enumerate((FOLDER / main).read_text().splitlines(), start=1):
        match = _INCLUDE.fullmatch(line)
        if match is None:
            parts.append(line)
            continue
        body = (FOLDER / match[1]).read_text().replace("#pragma once\n", "\n")
        parts.append(f'#line 1 "{match[1]}"\n{body}#line {number + 1} "{main}"')
    return "\n".join(parts) + "\n"


class _Stream:
    """What CuPy wants of a stream: its address."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class GpuKernel:
    """A CuPy function, launched on the device of the tensors and on torch's current stream there."""

    __slots__ = ("_functions", "_module")

    def __init__(self, module: Any) -> None:
        self._module = module
        self._functions: dict[int, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: tuple[Any, ...], device: torch.device
    ) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self._launch(index, grid, block, args)
        else:
            self._launch(index, grid, block, args)

    def load(self, device: torch.device) -> Any:
        """The function on a device; compiles there at the first call. ``device`` must be current."""
        index = torch.cuda.current_device() if device.index is None else device.index
        function = self._functions.get(index)
        if function is None:
            function = self._functions[index] = self._module.get_function(NAME).kernel
        return function

    def _launch(
        self, index: int, grid: tuple[int, int, int], block: tuple[int, int, int], args: tuple[Any, ...]
    ) -> None:
        function = self._functions.get(index)
        if function is None:
            function = self.load(torch.device("cuda", index))
        # torch's own accessor: torch.cuda.current_stream() builds an object, which costs more than the launch.
        stream = torch._C._cuda_getCurrentRawStream(index)
        function(grid, block, args, 0, _Stream(stream))


@cache
def compiled(specialization: Specialization) -> GpuKernel:
    """The kernel on the current device. Compiles at the first call; CuPy keeps the binary on disk as well.

    Raises ``cupy.cuda.compiler.CompileException``.
    """
    import cupy

    options = (*NVRTC_OPTIONS, *specialization.options())
    kernel = GpuKernel(cupy.RawModule(code=source(), options=options))
    kernel.load(torch.device("cuda", torch.cuda.current_device()))
    return kernel
