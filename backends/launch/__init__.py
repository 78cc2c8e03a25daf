"""One prepared launcher for machine code from any compiler: Triton, NVRTC (CuPy) and Numba.

A backend's ``Compiler`` (``compiler.py``) says how a call's arguments lie in memory (``Layout``) and makes the machine
code (``Image``); ``Launcher`` loads it through the CUDA driver and launches it on torch's current stream. What a call
repeats (strides, counts, scalars, the grid) is packed once, so a repeated call costs its addresses and one driver call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["sources"]


def sources() -> Sequence[Path]:
    """Files that decide what a prepared launch passes to a kernel; part of every GPU backend's fingerprint.

    They belong to no kernel: shipped tables outlive their edits (``Backend.shared_sources``).
    """
    return tuple(sorted(Path(__file__).parent.glob("*.py")))
