"""Compiled kernels on disk: Numba takes seconds per kernel, and the next process needs the same ones.

One pair of files per kernel, named by everything that could change it: the variant, the architecture, these sources and
the versions of what compiles them. Anything unreadable is a miss; a disk that cannot be written costs only the saving.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

import platformdirs

from ...registry.backend import fingerprint_files
from .backend import NumbaCuda
from .compile import Cubin, compile_variant
from .variant import Variant

__all__ = ["cubin", "directory"]

_log = logging.getLogger(__name__)
#: Modules that no kernel depends on.
_APART = frozenset({"cubins.py", "gpu.py", "gpu_bench.py", "gpu_check.py", "launch.py", "resources.py", "space.py"})


@cache
def directory() -> Path:
    """Where kernels are kept: ``numba_cuda`` in the root that ``ISOKERN_CACHE`` names, else in the user's cache."""
    root = os.environ.get("ISOKERN_CACHE") or platformdirs.user_cache_dir("isokern", appauthor=False)
    return Path(root) / "numba_cuda"


@cache
def _toolchain() -> str:
    backend = NumbaCuda()
    kernels = [path for path in backend.sources() if path.name not in _APART]
    return fingerprint_files(kernels, backend.toolchain())


def cubin(variant: Variant, arch: int) -> Cubin:
    """The compiled variant, from disk or from the compiler. Raises as ``compile_variant``."""
    name = hashlib.sha256(f"{variant!r} sm_{arch} {_toolchain()}".encode()).hexdigest()[:32]
    code, about = directory() / f"{name}.cubin", directory() / f"{name}.json"
    try:
        return Cubin(code=code.read_bytes(), **json.loads(about.read_text()))
    except (OSError, ValueError, TypeError):
        made = compile_variant(variant, arch)
    try:
        directory().mkdir(parents=True, exist_ok=True)
        _replace(code, made.code)
        _replace(about, json.dumps({"entry": made.entry, "report": made.report}).encode())
    except OSError as error:
        _log.warning("kernels are compiled anew in every process: cannot write to %s: %s", directory(), error)
    return made


def _replace(path: Path, content: bytes) -> None:
    """Write so that other processes see all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
