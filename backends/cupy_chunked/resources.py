"""What each config costs on each chip, known without a GPU: registers, spills, shared memory, occupancy.

``resources.json`` is the checked-in table. After a change of the kernels or the configs::

    python -m isokern.backends.cupy_chunked.resources --write

needs CuPy and NVRTC (``nvidia-cuda-nvrtc==13.0.*``), no driver, and a few minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.describe import describe
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.varlen.profile import VarlenProfile
from ..cupy.compiling import NVRTC_OPTIONS
from ..cupy.resources import reported, resident_warps
from ..resource_rows import Job, Key, Row, compile_rows, text_of
from .backend import CupyChunked
from .compiling import entry, source, sources, target
from .configs import configs, cut_configs, shared_limit
from .specialization import Specialization

__all__ = ["ARCHES", "COLUMNS", "TABLE", "fingerprint", "head", "measure", "problems", "rows"]

ARCHES = (80, 90, 100)
TABLE = Path(__file__).parent / "resources.json"
#: The kernels: the last two where sequences are cut.
KERNELS = ("prepare", "scan", "local", "join")
#: Of each: registers per thread, bytes spilled per thread, bytes of shared memory per block, and warps that a
#: multiprocessor can hold as far as registers and shared memory decide. Zeros for kernels that a config has not.
COLUMNS = tuple(f"{kernel} {what}" for kernel in KERNELS for what in ("registers", "spills", "shared", "warps"))

_PROMPT = CaseSpec("prompt", (70, 3), h=1, hv=2, k=128, v=128, strides="rows")
_CASES = (
    _PROMPT.but(name="fp32 kv"),
    _PROMPT.but(name="bf16 vk", state_dtype="bfloat16", state_layout="vk"),
    _PROMPT.but(name="K=V=64", k=64, v=64),
    _PROMPT.but(name="K=96 V=192", k=96, v=192),
    _PROMPT.but(name="K=V=256", k=256, v=256),
    _PROMPT.but(name="float16", io_dtype="float16"),
    _PROMPT.but(name="float32", io_dtype="float32"),
)


@cache
def problems(arch: int) -> Mapping[str, Problem]:
    """Representative problems by name: a prompt of 2048 tokens, with 16 and 32 heads."""
    profile = VarlenProfile.of(1, 2048, 2048)
    made = {spec.name: replace(describe(spec, "cuda", arch), h=16, hv=32, profile=profile) for spec in _CASES}
    backend = CupyChunked()
    return {name: problem for name, problem in made.items() if configs(problem, backend.pieces)}


def measure(problem: Problem, config: Config) -> Row:
    """One row: see :data:`COLUMNS`. Raises RuntimeError, with the compiler's log, if a kernel does not compile."""
    special = Specialization.of(problem, config, CupyChunked.pieces)
    row: list[int] = []
    for kernel in KERNELS:
        if kernel not in special.kernels:
            row += [0, 0, 0, 0]
            continue
        macros = special.options(kernel, wide=True)
        registers, spills, static = reported(
            source(kernel), f"{entry(kernel)}.cu", macros, target(kernel, special, problem.arch)
        )
        threads, dynamic = special.block(kernel)
        shared = static + dynamic
        warps = resident_warps(threads, registers, shared, shared_limit(problem.arch) + 1024)
        row += [registers, spills, shared, warps]
    return tuple(row)


def rows() -> Iterator[tuple[Key, Problem, Config]]:
    """Every config of every representative problem on every chip; of those that differ in ``cut`` alone one."""
    for arch in ARCHES:
        for name, problem in problems(arch).items():
            cut = {(c["warps"], c["local"], c["group"]): c for c in reversed(cut_configs(problem, CupyChunked.pieces))}
            for config in (*configs(problem, CupyChunked.pieces), *cut.values()):
                yield (name, arch, config.label), problem, config


def fingerprint() -> str:
    """Of what the table depends on."""
    here = Path(__file__).parent
    files = (*sources(), here / "specialization.py", here / "configs.py", here / "arguments.py")
    return fingerprint_files(files, {"options": str(NVRTC_OPTIONS)})


def head() -> dict[str, object]:
    """What stands above the rows."""
    return {"fingerprint": fingerprint(), "nvrtc": metadata.version("nvidia-cuda-nvrtc"), "columns": list(COLUMNS)}


def _measured(problem: Problem, config: Config) -> Sequence[Row]:
    return [measure(problem, config)]


def main(write: Annotated[bool, typer.Option(help="write resources.json instead of printing")] = False) -> None:
    """Compile every config of the representative problems and report what each costs."""
    jobs = [Job((key,), (problem, config)) for key, problem, config in rows()]
    made = compile_rows(jobs, _measured, f"isokern-cupy-chunked-{fingerprint()}", 2)
    text = text_of(head(), made)
    if write:
        TABLE.write_text(text)
    else:
        typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
