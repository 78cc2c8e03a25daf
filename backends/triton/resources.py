"""What every config costs, compiled without a GPU: registers, spills and shared memory, kept in ``resources.json``.

    python -m isokern.backends.triton.resources --write     compile everything and rewrite the table
    python -m isokern.backends.triton.resources             compile everything and compare with the table

The numbers are those of one Triton version, named in the file; another version is only held to compiling everything.
It takes some minutes. What an interrupted run has compiled is kept in the temporary directory, for the next one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import typer

from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from .. import resource_rows
from ..resource_rows import Job, Key, Row
from .configs import configs
from .usage import Resources, compile_config, problem_of

__all__ = [
    "ARCHITECTURES",
    "PROBLEMS",
    "TABLE",
    "Resources",
    "cache_in",
    "comparable",
    "compile_config",
    "compile_rows",
    "fingerprint",
    "load_table",
    "problem_of",
    "rows",
]

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 90, 100)

_MODEL = CaseSpec("decode", (1,) * 4, h=2, hv=4, k=128, v=128, state_layout="vk")
_PROMPTS = _MODEL.but(lengths=(9, 4))
#: What the table covers: model shapes with few heads (their number changes no code), one call of each kind.
PROBLEMS: Mapping[str, CaseSpec] = MappingProxyType(
    {
        "decode vk": _MODEL,
        "decode kv": _MODEL.but(state_layout="kv"),
        "decode vk, bfloat16 pool": _MODEL.but(state_dtype="bfloat16"),
        "prompts vk": _PROMPTS,
        "prompts kv": _PROMPTS.but(state_layout="kv"),
        "prompts vk, KDA": _PROMPTS.but(is_kda=True),
        "prompts vk, K=96 V=192": _PROMPTS.but(k=96, v=192),
        "tree vk": _PROMPTS.but(verify="tree", update="disabled"),
    }
)


def load_table() -> tuple[str, dict[Key, Resources]]:
    """The Triton version of the checked-in table, and its rows by (problem, architecture, config label)."""
    data = json.loads(TABLE.read_text())
    return data["triton"], {key: Resources(*row) for key, row in resource_rows.rows_of(data).items()}


def fingerprint() -> str:
    """Of the sources that the table depends on."""
    folder = Path(__file__).parent
    return fingerprint_files(folder / f"{name}.py" for name in ("arguments", "configs", "gates", "kernel", "tiles"))


def rows() -> Iterator[tuple[str, CaseSpec, int, Config]]:
    """What the table has rows for: every config of every problem for every architecture."""
    for name, spec in PROBLEMS.items():
        for arch in ARCHITECTURES:
            for config in configs(problem_of(spec)):
                yield name, spec, arch, config


def compile_rows(processes: int) -> dict[Key, Row]:
    """Compile all of :func:`rows`, in this many processes. Raises what :func:`compile_config` raises."""
    jobs = [Job(((name, arch, config.label),), (spec, config, arch)) for name, spec, arch, config in rows()]
    # Triton's own cache starts empty with the sources that this run is for.
    return resource_rows.compile_rows(jobs, _row, f"isokern-triton-resources-{_key()}", processes, cache_in)


def _row(spec: CaseSpec, config: Config, arch: int) -> tuple[Row]:
    return (tuple(compile_config(spec, config, arch).to_list()),)


def _key() -> str:
    """Of what decides the rows: the kernel's sources, how they are compiled here, and Triton's version."""
    here = Path(__file__)
    return fingerprint_files((here, here.with_name("usage.py")), {"kernel": fingerprint(), "triton": version("triton")})


def cache_in(folder: str) -> None:
    """Let this process's Triton keep what it compiles in ``folder``."""
    os.environ["TRITON_CACHE_DIR"] = folder


def comparable(known: str, rows: Mapping[Key, Row], made: Mapping[Key, Row]) -> Mapping[Key, Row]:
    """The ``rows`` of a table that Triton ``known`` made; another Triton has to compile all, to whatever figures."""
    return rows if known == version("triton") else {key: made.get(key, ()) for key in rows}


def main(
    write: bool = typer.Option(False, "--write", help="rewrite the table instead of comparing with it"),
    processes: int = typer.Option(2, min=1, help="how many compile at once"),
) -> None:
    """Compile every config of every problem for every architecture."""
    sources = fingerprint()  # of those that are about to be compiled
    made = compile_rows(processes)
    head = {"fingerprint": sources, "columns": ["registers", "spilled", "shared"], "triton": version("triton")}

    def listed() -> Mapping[Key, Row]:
        known, rows = load_table()
        return comparable(known, {key: tuple(row.to_list()) for key, row in rows.items()}, made)

    resource_rows.write_or_compare(write, TABLE, head, made, listed)


if __name__ == "__main__":
    typer.run(main)
