"""The machine a report was made on."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Machine", "describe_run", "find"]

_PACKAGES = ("torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "numba", "numba-cuda", "cuda-bindings", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    """The current CUDA device: its name, compute capability times ten, and the CUDA version torch is built for."""

    gpu: str
    arch: int
    cuda: str


def find() -> Machine | None:
    """The current CUDA device; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Machine(torch.cuda.get_device_name(), 10 * major + minor, str(torch.version.cuda))


def describe_run(machine: Machine, commit: str | None) -> dict[str, Any]:
    """``meta`` of a results file. ``commit``: what to call the sources; None asks git."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": machine.gpu,
        "arch": machine.arch,
        "cuda": machine.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python -m isokern.tools.gpu_test", *sys.argv[1:]]),
        "commit": commit or _commit(),
    }


def _commit() -> str | None:
    """HEAD, and whether anything but results differs from it; None outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        head, changes = ask("rev-parse", "HEAD").strip(), ask("status", "--porcelain").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if any("benchmarks/results" not in line for line in changes) else "")
