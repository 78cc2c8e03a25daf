"""Tables of what kernels cost: rows compiled in processes, kept over interruptions, and a file's text.

A row is a few whole numbers, known by its problem's name, its architecture and its config's label.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer

__all__ = ["Job", "Key", "Row", "compile_rows", "differences", "rows_of", "text_of", "write_or_compare"]

#: Problem, architecture, config label.
Key = tuple[str, int, str]
Row = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does at a time.

    Attributes:
        keys: of the rows it makes. arguments: what the compiling function is given; picklable.
    """

    keys: tuple[Key, ...]
    arguments: tuple[Any, ...]


def compile_rows(
    jobs: Sequence[Job],
    compile_job: Callable[..., Sequence[Row]],
    kept_as: str,
    processes: int,
    prepare: Callable[[str], None] | None = None,
) -> dict[Key, Row]:
    """The rows of all jobs, in their order; says each as it is done.

    What an interrupted run has compiled is kept in the temporary directory, for the next one.

    Args:
        compile_job: makes a job's rows from its arguments; a module's own function.
        kept_as: name of the folder there: another one whenever anything changes that decides a row.
        processes: how many compile at once.
        prepare: called in each process with a folder that is new with ``kept_as`` and goes with it.

    Raises what ``compile_job`` raises; rows made before that are kept.
    """
    folder = Path(tempfile.gettempdir()) / kept_as
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / "rows.jsonl"
    made = dict(_kept(kept))
    count = sum(len(job.keys) for job in jobs)
    todo = [job for job in jobs if not made.keys() >= set(job.keys)]
    begin = None if prepare is None else partial(prepare, str(folder / "scratch"))
    pool = ProcessPoolExecutor(processes, get_context("spawn"), begin)
    with pool, kept.open("a") as file:
        futures = {pool.submit(compile_job, *job.arguments): job for job in todo}
        try:
            for future in as_completed(futures):
                for key, row in zip(futures[future].keys, future.result(), strict=True):
                    made[key] = tuple(row)
                    file.write(json.dumps([*key, *row]) + "\n")
                    file.flush()
                    typer.echo(f"{len(made)} of {count}: {key[0]}, sm_{key[1]}, {key[2]}: {row}")
        finally:
            pool.shutdown(cancel_futures=True)
    shutil.rmtree(folder)
    return {key: made[key] for job in jobs for key in job.keys}


def _kept(file: Path) -> Iterator[tuple[Key, Row]]:
    """Rows of an earlier run, without the last line if an interruption cut it."""
    file.touch()
    text, newline, _ = file.read_text().rpartition("\n")
    os.truncate(file, len(text + newline))
    for name, arch, label, *numbers in map(json.loads, text.splitlines()):
        yield (name, arch, label), tuple(numbers)


def text_of(head: Mapping[str, Any], rows: Mapping[Key, Row]) -> str:
    """A table as JSON: ``head``, then the rows by problem, architecture and label."""
    problems: dict[str, dict[str, dict[str, list[int]]]] = {}
    for (name, arch, label), row in rows.items():
        problems.setdefault(name, {}).setdefault(f"sm_{arch}", {})[label] = list(row)
    text = json.dumps({**head, "problems": problems}, indent=1)
    return re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def rows_of(table: Mapping[str, Any]) -> dict[Key, Row]:
    """The rows of a table that was read back."""
    return {
        (problem, int(arch.removeprefix("sm_")), label): tuple(numbers)
        for problem, by_arch in table["problems"].items()
        for arch, by_config in by_arch.items()
        for label, numbers in by_config.items()
    }


def differences(made: Mapping[Key, Row], listed: Mapping[Key, Row]) -> Iterable[str]:
    """What a table says otherwise, a line for each row."""
    for key in sorted(made.keys() | listed.keys()):
        if made.get(key) != listed.get(key):
            yield f"{key}: compiled {made.get(key)}, in the table {listed.get(key)}"


def write_or_compare(
    write: bool, table: Path, head: Mapping[str, Any], made: Mapping[Key, Row], listed: Callable[[], Mapping[Key, Row]]
) -> None:
    """Rewrite ``table``, or say what it has otherwise than what was ``made``.

    Args:
        listed: the rows it has; not asked where it is rewritten, when there may be none.

    Raises typer.Exit: with status 1, if a row differs.
    """
    if write:
        table.write_text(text_of(head, made))
        return
    wrong = list(differences(made, listed()))
    for line in wrong:
        typer.echo(line, err=True)
    if wrong:
        raise typer.Exit(1)
