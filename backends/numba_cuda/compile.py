"""Variant to machine code: Numba to PTX to a cubin, with or without a GPU in the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from .kernel import recurrence
from .parameters import FLOATS, NUMBERS, POINTERS, STRIDES
from .target import gpu
from .variant import Variant

__all__ = ["Cubin", "Resources", "compile_variant"]

#: The PTX is for the oldest architecture supported and uses nothing newer; the assembler specialises it.
_PTX_ARCH = (8, 0)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one thread (registers, bytes of stack and spills) and one block (bytes of shared memory) take."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel: machine code for one architecture, the kernel's name in it, the assembler's report."""

    code: bytes
    entry: str
    report: str

    @property
    def resources(self) -> Resources:
        """What the kernel takes. Raises RuntimeError if the assembler did not report it."""
        return _resources(self.report)


@lru_cache(maxsize=256)
def _ptx(variant: Variant) -> str:
    from numba import cuda, types

    signature = types.void(
        *[types.int64] * len(POINTERS),
        types.UniTuple(types.int64, len(STRIDES)),  # type: ignore[no-untyped-call]
        *[types.int64] * len(NUMBERS),
        *[types.float32] * len(FLOATS),
    )
    # Registers are what limits how many blocks share a multiprocessor; without a bound each takes what it likes.
    bounds = (variant.threads, variant.resident)
    ptx, _ = cuda.compile(
        recurrence(variant, gpu()),
        signature,
        device=False,
        abi="numba",
        cc=_PTX_ARCH,
        output="ptx",
        launch_bounds=bounds,
    )
    return ptx.decode() if isinstance(ptx, bytes) else str(ptx)


@lru_cache(maxsize=256)
def compile_variant(variant: Variant, arch: int) -> Cubin:
    """Compile for compute capability ``arch / 10``. Takes some seconds; touches no device.

    Raises what Numba, NVVM and the linker raise: ``numba.core.errors.NumbaError``, ``RuntimeError`` and their like.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode

    ptx = _ptx(variant)
    entry = re.search(r"\.entry\s+([\w$]+)", ptx)
    if entry is None:
        raise RuntimeError("the PTX defines no kernel")
    options = LinkerOptions(arch=f"sm_{arch}", verbose=True, ptxas_options="-v")
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    code = bytes(linker.link("cubin").code)
    return Cubin(code, entry.group(1), linker.get_info_log())


def _resources(log: str) -> Resources:
    """Read the assembler's report. Raises RuntimeError if it does not report."""

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"the assembler's report lacks {pattern!r}: {log[-500:]}")
        return int(found.group(1))

    return Resources(
        registers=number(r"[Uu]sed (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared=number(r"(\d+) bytes smem"),
    )
