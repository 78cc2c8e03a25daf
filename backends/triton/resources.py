"""What every config costs, compiled without a GPU: registers, spills and shared memory, kept in ``resources.json``.

    python -m isokern.backends.triton.resources --write     compile everything and rewrite the table
    python -m isokern.backends.triton.resources             compile everything and compare with the table

The numbers are those of one Triton version, named in the file; another version is only held to compiling everything.
It takes some minutes. What an interrupted run has compiled is kept in the temporary directory, for the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType

import typer

from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from .configs import configs
from .usage import Resources, compile_config, problem_of

__all__ = [
    "ARCHITECTURES",
    "PROBLEMS",
    "TABLE",
    "Resources",
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
#: Of a row: problem, architecture, config label.
_Key = tuple[str, int, str]


def load_table() -> tuple[str, dict[_Key, Resources]]:
    """The Triton version of the checked-in table, and its rows by (problem, architecture, config label)."""
    data = json.loads(TABLE.read_text())
    listed = {
        (problem, int(arch.removeprefix("sm_")), label): Resources(*numbers)
        for problem, by_arch in data["problems"].items()
        for arch, by_config in by_arch.items()
        for label, numbers in by_config.items()
    }
    return data["triton"], listed


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


def compile_rows(processes: int) -> dict[_Key, Resources]:
    """Compile all of :func:`rows`, in this many processes; say each row as it is done.

    Raises what :func:`compile_config` raises; rows compiled before that are found again by the next run.
    """
    work = {(name, arch, config.label): (spec, config, arch) for name, spec, arch, config in rows()}
    folder = Path(tempfile.gettempdir()) / f"isokern-triton-resources-{_key()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / "rows.jsonl"
    made = _kept(kept)
    todo = [key for key in work if key not in made]
    # Triton's own cache starts empty with the sources that this run is for.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _cache_in, (str(folder / "triton"),))
    with pool, kept.open("a") as file:
        futures = {pool.submit(compile_config, *work[key]): key for key in todo}
        try:
            for future in as_completed(futures):
                key = futures[future]
                made[key] = future.result()
                file.write(json.dumps([*key, *made[key].to_list()]) + "\n")
                file.flush()
                typer.echo(f"{len(made)} of {len(work)}: {key[0]}, sm_{key[1]}, {key[2]}: {made[key]}")
        finally:
            pool.shutdown(cancel_futures=True)
    shutil.rmtree(folder)
    return {key: made[key] for key in work}


def _key() -> str:
    """Of what decides the rows: the kernel's sources, how they are compiled here, and Triton's version."""
    here = Path(__file__)
    return fingerprint_files((here, here.with_name("usage.py")), {"kernel": fingerprint(), "triton": version("triton")})


def _kept(file: Path) -> dict[_Key, Resources]:
    """Rows of an earlier run, without the last line if an interruption cut it."""
    file.touch()
    text, newline, _ = file.read_text().rpartition("\n")
    os.truncate(file, len(text + newline))
    rows_made = map(json.loads, text.splitlines())
    return {(name, arch, label): Resources(*numbers) for name, arch, label, *numbers in rows_made}


def _cache_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def main(
    write: bool = typer.Option(False, "--write", help="rewrite the table instead of comparing with it"),
    processes: int = typer.Option(2, min=1, help="how many compile at once"),
) -> None:
    """Compile every config of every problem for every architecture."""
    made = compile_rows(processes)
    if write:
        TABLE.write_text(_text(made))
        return
    known, listed = load_table()
    different = [key for key, row in made.items() if listed.get(key) != row and known == version("triton")]
    for key in different:
        typer.echo(f"differs from the table: {key}", err=True)
    missing = sorted(set(listed) - set(made))
    for key in missing:
        typer.echo(f"in the table only: {key}", err=True)
    if different or missing:
        raise typer.Exit(1)


def _text(made: dict[_Key, Resources]) -> str:
    table: dict[str, dict[str, dict[str, list[int]]]] = {}
    for (name, arch, label), row in made.items():
        table.setdefault(name, {}).setdefault(f"sm_{arch}", {})[label] = row.to_list()
    data = {
        "fingerprint": fingerprint(),
        "columns": ["registers", "spilled", "shared"],
        "triton": version("triton"),
        "problems": table,
    }
    return re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", json.dumps(data, indent=1)) + "\n"


if __name__ == "__main__":
    typer.run(main)
