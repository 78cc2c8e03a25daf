"""What each config costs on each chip, known without a GPU: registers, spills, shared memory, occupancy.

``resources.json`` is the checked-in table. After a change of the kernel or the configs::

    python -m isokern.backends.cupy.resources --write

needs CuPy and NVRTC (``nvidia-cuda-nvrtc==13.0.*``), no driver, and some minutes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.inputs import make_inputs
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from ...registry.varlen.profile import VarlenProfile
from .compiling import NAME, NVRTC_OPTIONS, source, sources
from .configs import configs
from .specialization import Specialization

__all__ = [
    "ARCHES",
    "TABLE",
    "Usage",
    "fingerprint",
    "measure",
    "problems",
    "reported",
    "resident_warps",
    "rows",
    "table",
]

ARCHES = (80, 90, 100)
TABLE = Path(__file__).parent / "resources.json"

_DECODE = CaseSpec("decode", (1, 1), h=1, hv=2, k=128, v=128, state_layout="vk", strides="rows")
_SEQUENCES = _DECODE.but(name="sequences", lengths=(3, 3))

#: Representative cases: what is served, and what costs most. Given the head counts and batch of a served model below.
_CASES = (
    _DECODE.but(name="decode, fp32 vk"),
    _DECODE.but(name="decode, bf16 kv", state_dtype="bfloat16", state_layout="kv"),
    _SEQUENCES.but(name="sequences, fp32 kv", state_layout="kv"),
    _SEQUENCES.but(name="sequences, kda", is_kda=True),
    _SEQUENCES.but(name="tree, bf16 buffer", verify="tree", intermediate_dtype="bfloat16"),
    _SEQUENCES.but(name="K=96 V=192", k=96, v=192),
)


@cache
def problems() -> Mapping[str, Problem]:
    """Representative problems by name: 64 decode steps, or 16 sequences of 16 tokens, with 16 and 32 heads."""
    made = {}
    for spec in _CASES:
        problem = canonical_call(**make_inputs(spec).kwargs).problem("graph")
        n, longest = (64, 1) if spec.lengths == _DECODE.lengths else (16, 16)
        profile = VarlenProfile.of(n, n * longest, longest)
        made[spec.name] = replace(problem, device="cuda", arch=90, h=16, hv=32, profile=profile)
    return made


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one kernel on one chip.

    Attributes:
        registers: per thread; spills: bytes stored to local memory per thread; shared: bytes per block.
        warps: warps an SM can hold, out of 64, as far as registers and shared memory decide.
    """

    registers: int
    spills: int
    shared: int
    warps: int


def measure(specialization: Specialization, arch: int) -> Usage:
    """Compile for ``arch`` (80, 90, 100) and read ptxas' report. Raises RuntimeError, with the log, if it fails."""
    registers, spills, shared = reported(source(), f"{NAME}.cu", specialization.options(), arch)
    return Usage(registers, spills, shared, resident_warps(specialization.threads, registers, shared))


def reported(text: str, name: str, macros: Sequence[str], arch: int | str) -> tuple[int, int, int]:
    """Registers per thread, bytes spilled per thread, and static shared memory of a source compiled for ``arch``."""
    log = compiler_log(text, name, macros, arch)
    shared = int(_found(r"(\d+) bytes smem", log)) if "bytes smem" in log else 0
    return int(_found(r"Used (\d+) registers", log)), int(_found(r"(\d+) bytes spill stores", log)), shared


def compiler_log(text: str, name: str, macros: Sequence[str], arch: int | str) -> str:
    """What ptxas says of a source compiled for ``sm_<arch>``. Raises RuntimeError if it does not compile."""
    nvrtc: Any = import_module("cupy_backends.cuda.libs.nvrtc")
    options = (f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v", *NVRTC_OPTIONS, *macros)
    program = nvrtc.createProgram(text, name, (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{name} {macros}: {error}\n{nvrtc.getProgramLog(program)}") from error
        return str(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def _found(pattern: str, log: str) -> str:
    match = re.search(pattern, log)
    if match is None:
        raise RuntimeError(f"ptxas' report lacks {pattern!r}:\n{log}")
    return match[1]


def resident_warps(threads: int, registers: int, shared: int, most_shared: int = 163 << 10) -> int:
    """Registers are given out 256 at a time per warp, shared memory (1 KiB of it reserved) by the block."""
    per_warp = -(-registers * 32 // 256) * 256
    warps = threads // 32
    blocks = min(65536 // (per_warp * warps), most_shared // (shared + 1024), 32)
    return min(64, blocks * warps)


def rows() -> Iterator[tuple[str, Config, Specialization]]:
    """Every config of every representative problem."""
    for name, problem in problems().items():
        for config in configs(problem):
            yield name, config, Specialization.of(problem, config)


def fingerprint() -> str:
    """Of what the table depends on."""
    here = Path(__file__).parent
    return fingerprint_files(
        (*sources(), here / "specialization.py", here / "configs.py"), {"options": str(NVRTC_OPTIONS)}
    )


def table() -> dict[str, Any]:
    """The table as it would be written; compiles everything."""
    seen: dict[tuple[Specialization, int], Usage] = {}
    entries = []
    for name, config, specialization in rows():
        for arch in ARCHES:
            key = (specialization, arch)
            if key not in seen:
                seen[key] = measure(specialization, arch)
            entries.append({"problem": name, "config": config.label, "arch": arch, **asdict(seen[key])})
    return {"fingerprint": fingerprint(), "nvrtc": metadata.version("nvidia-cuda-nvrtc"), "entries": entries}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m isokern.backends.cupy.resources", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write resources.json instead of printing")
    chosen = parser.parse_args()
    made = table()
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in made["entries"])
    head = {key: value for key, value in made.items() if key != "entries"}
    text = json.dumps(head, indent=2)[:-2] + f',\n  "entries": [\n{lines}\n  ]\n}}\n'
    if chosen.write:
        TABLE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
