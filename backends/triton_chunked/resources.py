"""What every config costs, compiled without a GPU: registers, spills and shared memory, kept in ``resources.json``.

    python -m isokern.backends.triton_chunked.resources --write     compile everything and rewrite the table
    python -m isokern.backends.triton_chunked.resources             compile everything and compare with the table

As the recurrent kernel's (``backends/triton/resources.py``); a row has both kernels' figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import typer

from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .. import resource_rows
from ..resource_rows import Job, Key, Row
from ..triton.resources import cache_in, comparable
from ..triton.usage import problem_of, report
from .backend import TritonChunked
from .configs import configs

__all__ = [
    "ARCHITECTURES",
    "COLUMNS",
    "PROBLEMS",
    "TABLE",
    "fingerprint",
    "load_table",
    "measure",
    "problem_at",
    "rows",
]

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 90, 100)
COLUMNS = tuple(f"{kernel} {what}" for kernel in ("prepare", "scan") for what in ("registers", "spilled", "shared"))

_GDN = CaseSpec("prompts", (1024,) * 8, h=16, hv=32, k=128, v=128, state_layout="vk", extra_slots=0)
#: What the table covers: the model's shapes (how many heads and tokens changes no code).
PROBLEMS: Mapping[str, CaseSpec] = MappingProxyType(
    {
        "prompts vk": _GDN,
        "prompts vk, KDA": _GDN.but(h=32, is_kda=True),
        "prompts kv, K=96 V=192": _GDN.but(k=96, v=192, state_layout="kv"),
    }
)


def problem_at(name: str, arch: int) -> Problem:
    """A problem of the table on a GPU of compute capability ``arch / 10``; lengths are as good as the real ones."""
    return replace(problem_of(PROBLEMS[name].but(lengths=(2,) * 8)), arch=arch)


def load_table() -> tuple[str, dict[Key, Row]]:
    """The Triton version of the checked-in table, and its rows by (problem, architecture, config label)."""
    data = json.loads(TABLE.read_text())
    return data["triton"], {key: tuple(row) for key, row in resource_rows.rows_of(data).items()}


def fingerprint() -> str:
    """Of the sources that the table depends on."""
    here, shared = Path(__file__).parent, Path(__file__).parents[1] / "triton"
    own = ("arguments", "chunks", "configs", "prepare", "products", "scan")
    return fingerprint_files((*(here / f"{name}.py" for name in own), shared / "gates.py"))


def rows() -> Iterator[tuple[str, int, Config]]:
    """What the table has rows for: every config of every problem for every architecture that takes it."""
    for name in PROBLEMS:
        for arch in ARCHITECTURES:
            problem = problem_at(name, arch)
            if TritonChunked().check(problem):
                for config in configs(problem):
                    yield name, arch, config


def measure(name: str, arch: int, config: Config) -> Row:
    """A row of :data:`COLUMNS`. Raises what Triton raises if a kernel does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ..launch.sketch import sketch
    from .launcher import compilers

    problem = problem_at(name, arch)
    found: list[int] = []
    for compiler in compilers(problem, config, TritonChunked.pieces):
        layout = compiler.layout(sketch(problem))
        source = compiler.source(layout.key, wide=True)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(compiler.form.options(config)))
        found += report(made.asm["cubin"], int(made.metadata.shared)).to_list()
    return tuple(found)


def _job(name: str, arch: int, config: Config) -> tuple[Row]:
    return (measure(name, arch, config),)


def _compiled(processes: int) -> dict[Key, Row]:
    jobs = [Job(((name, arch, config.label),), (name, arch, config)) for name, arch, config in rows()]
    key = fingerprint_files((Path(__file__),), {"kernels": fingerprint(), "triton": version("triton")})
    return resource_rows.compile_rows(jobs, _job, f"isokern-triton-chunked-resources-{key}", processes, cache_in)


def main(
    write: bool = typer.Option(False, "--write", help="rewrite the table instead of comparing with it"),
    processes: int = typer.Option(2, min=1, help="how many compile at once"),
) -> None:
    """Compile every config of every problem for every architecture."""
    sources = fingerprint()  # of those that are about to be compiled
    made = _compiled(processes)
    head = {"fingerprint": sources, "columns": list(COLUMNS), "triton": version("triton")}
    resource_rows.write_or_compare(write, TABLE, head, made, lambda: comparable(*load_table(), made))


if __name__ == "__main__":
    typer.run(main)
