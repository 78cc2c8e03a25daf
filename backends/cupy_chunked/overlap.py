"""Overlap: whether kernels may start before the one before them ends (programmatic dependent launch)."""

from __future__ import annotations

import ctypes
from functools import cache

__all__ = ["can_overlap"]

#: Compute capability (times ten) that has the instructions, and the driver that takes such launches into CUDA graphs.
_FIRST_ARCH, _FIRST_DRIVER = 90, 12030


def can_overlap(arch: int) -> bool:
    """Whether launches on ``arch`` (compute capability times ten) may ask for it, with this machine's driver."""
    return arch >= _FIRST_ARCH and _driver() >= _FIRST_DRIVER


@cache
def _driver() -> int:
    """The driver's CUDA version, as 1000 major + 10 minor; where there is none, the oldest that can."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _FIRST_DRIVER  # kernels are compiled here for a machine that has one
    version = ctypes.c_int()
    code = library.cuDriverGetVersion(ctypes.byref(version))
    return version.value if code == 0 else 0
