"""Compiling CUDA C++ with g++: one shared object for the scheduler, one per kernel, remembered by content."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import platformdirs

__all__ = ["BuildError", "build_folder", "build_kernel", "runtime"]

_HERE = Path(__file__).parent
_HEADERS = _HERE / "include"
_COMMON = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE")
#: Undefined behaviour traps; a misaligned vector access would fault on a GPU as well.
_KERNEL = (
    *_COMMON,
    "-fno-strict-aliasing",
    "-fno-thread-jumps",  # a barrier in two copies would look like two barriers
    "-fvisibility=hidden",
    "-Wno-attributes",
    "-Wno-unknown-pragmas",
    "-fsanitize=signed-integer-overflow,shift,bounds,integer-divide-by-zero,alignment",
    "-fsanitize-undefined-trap-on-error",
)
_DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+((?:__align__\s*\(\s*\d+\s*\)\s*)?)([\w:]+(?:\s+[\w:]+)*?)\s+(\w+)\s*\[\s*\]\s*;"
)


class BuildError(RuntimeError):
    """g++ is missing, or refuses the source; the message holds what it said."""


def build_folder() -> Path:
    """Where built objects are kept: the user's cache, or a temporary folder if that cannot be written."""
    folder = Path(platformdirs.user_cache_dir("isokern")) / "cuda_on_cpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home is no reason not to test
    folder = Path(tempfile.gettempdir()) / f"isokern-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@cache
def runtime() -> ctypes.CDLL:
    """The scheduler, the watch and what runs beside threads, loaded once per process so that all kernels share them.

    Raises BuildError.
    """
    sources = tuple(_HERE / f"{name}.cpp" for name in ("runtime", "watch", "tensor_core", "copies"))
    flags = (*_COMMON, "-O2", "-I", str(_HEADERS), "-Wall", "-Wextra")
    text = "".join(f.read_text() for f in (*sources, *sorted(_HEADERS.iterdir())))
    library = _built("runtime", text, flags, [str(s) for s in sources])
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def build_kernel(source: str, name: str, options: Sequence[str] = (), *, watched: bool = False) -> Path:
    """Compile the kernel ``name`` of a CUDA C++ source to a shared object that exports ``launch_<name>``.

    Args:
        source: CUDA C++, without files of its own to include.
        options: of NVRTC; ``-D`` counts, the others say nothing to g++.
        watched: put a call in front of every memory access.

    Raises BuildError.
    """
    flags = [*_KERNEL, *(o for o in options if o.startswith("-D")), "-I", str(_HEADERS)]
    if watched:
        flags += ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
    body = _DYNAMIC_SHARED.sub(r"\2* \3 = (\2*)cuda_on_cpu::dynamic_shared();", source)
    text = f'#include "cuda_on_cpu.h"\n#line 1 "{name}.cu"\n{body}\nCUDA_ON_CPU_EXPORT({name})\n'
    return _built(name, text, flags, None, (_HEADERS / "cuda_on_cpu.h").read_text())


def _built(name: str, text: str, flags: Sequence[str], sources: list[str] | None, depends: str = "") -> Path:
    """The shared object for these contents and flags, compiled if it is not there yet."""
    key = hashlib.sha256("\0".join((text, depends, *flags, _machine())).encode()).hexdigest()[:20]
    target = build_folder() / f"{name}-{key}.so"
    if target.exists():
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError("g++ is not installed; the CUDA-on-CPU engine compiles kernels with it")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        if sources is None:
            source = Path(scratch) / f"{name}.cpp"
            source.write_text(text)
            unlinked = Path(scratch) / f"{name}.o"
            # Linked by itself: with -fsanitize=thread g++ would link the sanitizer's own library as well.
            _run([compiler, *(f for f in flags if f != "-shared"), "-c", str(source), "-o", str(unlinked)])
            _run([compiler, "-shared", str(unlinked), "-o", str(made)])
        else:
            _run([compiler, *flags, *sources, "-o", str(made)])
        os.replace(made, target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command[:1])} failed:\n{done.stderr.strip()[:4000]}")


@cache
def _machine() -> str:
    """What -march=native depends on, for homes that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
