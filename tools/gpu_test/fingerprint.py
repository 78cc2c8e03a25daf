"""What a result depends on: a result is as good as new while none of it has changed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from ...registry import backends as registered
from ...registry.backend import fingerprint_files

__all__ = ["fingerprint"]

_ROOT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).parent
_KINDS = (".py", ".cu", ".cuh", ".h", ".toml")
#: Of this folder, what decides a stage's results. How tasks are spread over processes and reported does not.
_OWN = {
    "suite": ("suite.py",),
    "configs": ("calls.py", "cases.py", "configs.py"),
    "properties": ("calls.py", "cases.py", "examine.py", "far.py", "properties.py", "streams.py"),
    "sanitizer": ("cases.py", "sanitized.py", "sanitizer.py"),
    "bench": ("bench.py", "cells.py", "conformity.py", "sglang.py", "timing.py"),
}


def fingerprint(stage: str, implementation: str, op: str, gpu: str) -> str:
    """16 hex digits over the sources, compilers and GPU behind the rows of ``implementation`` in ``stage``."""
    own = [_HERE / name for name in _OWN.get(stage, ())]
    backend = registered(op).get(implementation)
    versions = {"gpu": gpu, "torch": _version("torch")}
    if backend is None:  # a peer's kernel
        return fingerprint_files(own, versions | {"triton": _version("triton")})
    return fingerprint_files((*own, *_sources(implementation)), versions | dict(backend.toolchain()))


@cache
def _sources(backend: str) -> tuple[Path, ...]:
    """The backend's folder, the launchers, the op and its suite."""
    folders = (f"backends/{backend}", "backends/launch", "registry")
    shared = _ROOT / "backends" / backend
    return tuple(_files(_ROOT / name for name in (folders if shared.is_dir() else ("backends", "registry"))))


def _files(folders: Iterable[Path]) -> list[Path]:
    return sorted(
        file
        for folder in folders
        for file in folder.rglob("*")
        if file.suffix in _KINDS and not file.name.startswith("resources")
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
