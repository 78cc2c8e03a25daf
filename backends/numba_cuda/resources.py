"""What every config costs, compiled without a GPU: registers, spills and shared memory, kept in ``resources.json``.

    python -m isokern.backends.numba_cuda.resources --write     compile everything and rewrite the table
    python -m isokern.backends.numba_cuda.resources             compile everything and compare with the table

Another assembler may allocate a few registers differently: compare with the versions that the file names. It takes some
minutes. What an interrupted run has compiled is kept in the temporary directory, for the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import astuple, fields
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import typer

from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.describe import describe
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .. import resource_rows
from ..resource_rows import Job, Key, Row
from .compile import Resources, compile_variant
from .space import configs_for
from .variant import Variant

__all__ = ["ARCHITECTURES", "PROBLEMS", "TABLE", "compile_rows", "fingerprint", "load_table", "measured", "problem_of"]

ARCHITECTURES = (80, 90, 100)
TABLE = Path(__file__).with_name("resources.json")

#: Modules that no kernel depends on.
_APART = frozenset({"__init__.py", "backend.py", "launch.py", "resources.py"})
#: What compiles: Numba to PTX, and the assembler from there.
_COMPILERS = ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink")

_QWEN = CaseSpec("", (1,) * 64, h=16, hv=32, k=128, v=128, state_layout="vk")
#: What the table covers, by name; every config of each.
PROBLEMS: Mapping[str, CaseSpec] = MappingProxyType(
    {
        "decode, float32 vk": _QWEN,
        "prompts, float32 vk": _QWEN.but(lengths=(16,) * 16),
        "decode, bfloat16 kv": _QWEN.but(state_dtype="bfloat16", state_layout="kv"),
        "prompts, float32 kv": _QWEN.but(lengths=(16,) * 16, state_layout="kv"),
        "prompts, kda": _QWEN.but(lengths=(16,) * 16, is_kda=True, h=32),
        "prompts, K=96 V=192": _QWEN.but(lengths=(16,) * 4, k=96, v=192, io_dtype="float16", state_dtype="float16"),
        "prompts, K=256 V=256": _QWEN.but(lengths=(16,) * 4, k=256, v=256),
        "tree": _QWEN.but(lengths=(8,) * 8, verify="tree", update="disabled"),
        "strided": _QWEN.but(lengths=(16,) * 4, strides="any"),
    }
)


def problem_of(name: str, arch: int) -> Problem:
    """The problem of this name on a GPU of this architecture."""
    return describe(PROBLEMS[name], "cuda", arch)


def measured(name: str, config: Config, arch: int) -> Resources:
    """One row of the table, compiled now. Raises as ``compile_variant``."""
    return compile_variant(Variant.of(problem_of(name, arch), config, wide=True), arch).resources


def rows() -> Iterator[tuple[str, Config, int]]:
    """What the table has rows for: problem, config, architecture. The first config of a problem is its default."""
    for name in PROBLEMS:
        for arch in ARCHITECTURES:
            for config in configs_for(problem_of(name, arch)):
                yield name, config, arch


def load_table() -> dict[Key, Resources]:
    """The rows of the checked-in table by (problem, architecture, config label)."""
    return {key: Resources(*row) for key, row in resource_rows.rows_of(json.loads(TABLE.read_text())).items()}


def fingerprint() -> str:
    """Of the sources that the table depends on."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return fingerprint_files(module for module in modules if module.name not in _APART)


def compile_rows(processes: int) -> dict[Key, Row]:
    """Compile all of :func:`rows`, in this many processes. Raises as ``compile_variant``."""
    # One PTX serves all architectures, in the process that has made it.
    arches: dict[tuple[str, Config], list[int]] = {}
    for name, config, arch in rows():
        arches.setdefault((name, config), []).append(arch)
    jobs = [
        Job(tuple((name, arch, config.label) for arch in of), (name, config, of))
        for (name, config), of in arches.items()
    ]
    return resource_rows.compile_rows(jobs, _rows, f"isokern-numba-cuda-resources-{_key()}", processes)


def _rows(name: str, config: Config, arches: list[int]) -> list[Row]:
    return [astuple(measured(name, config, arch)) for arch in arches]


def _key() -> str:
    """Of what decides the rows: the kernels' sources, what is compiled of them here, and the compilers."""
    return fingerprint_files((Path(__file__),), {"kernels": fingerprint(), **_compilers()})


def _compilers() -> dict[str, str]:
    return {name: version(name) for name in _COMPILERS}


def main(
    write: bool = typer.Option(False, "--write", help="rewrite the table instead of comparing with it"),
    processes: int = typer.Option(2, min=1, help="how many compile at once"),
) -> None:
    """Compile every config of every problem for every architecture."""
    sources = fingerprint()  # of those that are about to be compiled
    made = compile_rows(processes)
    columns = [field.name for field in fields(Resources)]
    head = {"fingerprint": sources, "columns": columns, "compilers": _compilers()}
    resource_rows.write_or_compare(
        write, TABLE, head, made, lambda: {key: astuple(row) for key, row in load_table().items()}
    )


if __name__ == "__main__":
    typer.run(main)
