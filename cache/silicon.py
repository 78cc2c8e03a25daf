"""What the machine is made of, as far as it decides which kernel is fastest."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import StoreError

__all__ = ["CpuSilicon", "CudaSilicon", "ask_ahead", "cuda_driver", "cuda_kernel_module", "read_cpu", "read_cuda"]

_asking = threading.Lock()

_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA_MODULE = Path("/sys/module/nvidia/version")

#: Vector instructions that change which CPU kernel is compiled or called. Other flags (crypto,
#: virtualisation, mitigations) come and go with kernel updates and would orphan a store for nothing.
_DECIDING_FLAGS = (
    {"avx", "avx2", "fma", "f16c", "avx_vnni", "avx_ne_convert"}
    | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni"}
    | {"amx_tile", "amx_bf16", "amx_fp16", "amx_int8"}
    | {"neon", "asimd", "asimdhp", "asimdfhm", "bf16", "i8mm", "sve", "sve2", "svebf16", "sme", "sme2"}
)


@dataclass(frozen=True, slots=True)
class CpuSilicon:
    """A CPU.

    Attributes:
        arch: machine architecture, ``x86_64`` or ``aarch64``.
        logical_cores: of the whole machine; how many of them were used is ``Environment.threads``.
        isa: sorted vector instruction sets that decide kernels; empty where the system has no /proc/cpuinfo.
    """

    arch: str
    logical_cores: int
    isa: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CudaSilicon:
    """A CUDA device. Three numbers, because two are not enough: H100 and H200 share the first two.

    Attributes:
        capability: compute capability, ``"9.0"``.
        sm_count: streaming multiprocessors (a MIG slice has fewer).
        memory_gib: device memory, rounded to whole GiB since ECC and firmware move the last digits.
    """

    capability: str
    sm_count: int
    memory_gib: int


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """(model name or "", deciding instruction sets) of the first processor in a /proc/cpuinfo text."""
    model, flags = "", ""
    for line in text.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        match name.strip():
            case "model name":
                model = value.strip()
            case "flags" | "Features":  # x86 | aarch64
                flags = value
    return model, tuple(sorted(_DECIDING_FLAGS.intersection(flags.split())))


def read_cpu() -> tuple[CpuSilicon, str]:
    """This machine's CPU and its model name ("" where the system does not tell)."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:  # macOS, Windows, or a sandbox without it
        text = ""
    model, isa = parse_cpuinfo(text)
    return CpuSilicon(platform.machine(), os.cpu_count() or 1, isa), model or platform.processor()


def read_cuda(index: int | None = None) -> tuple[CudaSilicon, str]:
    """A CUDA device (the current one by default) and its product name. Initialises CUDA in this process never.

    Raises:
        StoreError: no CUDA device, or none with that index.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if index is None else index
        if index >= count:
            raise StoreError(f"cuda:{index} does not exist: this process sees {count} CUDA device(s)")
        found = torch.cuda.get_device_properties(index)
        facts = (found.major, found.minor, found.multi_processor_count, found.total_memory, found.name)
    else:
        with _asking:  # once, if it is being asked ahead
            facts = _probe(index or 0)
    major, minor, sm_count, memory, name = facts
    return CudaSilicon(f"{major}.{minor}", sm_count, round(memory / 2**30)), name


def ask_ahead(device: str) -> None:
    """Begin to ask for what :func:`read_cuda` will tell of a CUDA device, which takes about as long as importing torch.

    Whoever reads it waits for the answer. Nothing to do for a CPU; a device that cannot be asked is the reader's error.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu" or "torch" in sys.modules or not (index or "0").isdecimal():
        return

    def ask() -> None:
        with _asking, suppress(StoreError):
            _probe(int(index or 0))

    threading.Thread(target=ask, name="cuda probe", daemon=True).start()


@cache
def _probe(index: int) -> tuple[int, int, int, int, str]:
    """Ask a process of its own: a driver that is initialised here could not be used after a fork."""
    script = Path(__file__).with_name("cuda_probe.py")
    try:
        asked = subprocess.run(
            [sys.executable, "-I", str(script), str(index)], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoreError(f"no CUDA device can be asked for: {error}") from error
    if asked.returncode:
        raise StoreError(f"no CUDA device is available to this process: {asked.stderr.strip()}")
    facts = json.loads(asked.stdout)
    return facts["major"], facts["minor"], facts["sm_count"], facts["memory_bytes"], facts["name"]


def cuda_driver() -> str:
    """The CUDA version of the user-mode driver, ``"13.0"``; ``"unknown"`` where libcuda cannot be loaded.

    That library holds the PTX compiler and the launch path, changes with each driver branch, and is what a
    forward-compatibility package replaces, so it is a better identity than the kernel module's version.
    Asking it initialises nothing.
    """
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "unknown"
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "unknown"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def cuda_kernel_module() -> str:
    """The kernel module's full version, ``"580.95.05"``, or "" where it is not visible (some containers)."""
    try:
        return _NVIDIA_MODULE.read_text().strip()
    except OSError:
        return ""
