"""Compiling ahead of measuring, in processes that see no GPU: what is timed later shares the machine with nobody.

Kernels go where the backends' own caches find them. What fails here fails again when the candidate is bound, and gets
its verdict there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, Queue, SimpleQueue
from typing import Any

from .candidates import Candidate
from .progress import Progress
from .recipe import ProblemRecipe
from .tuner import Task
from .worker import CandidateFailure, Limits, Worker, WorkerError

__all__ = ["Compilation", "compilations", "compile_ahead", "processors"]

#: For the compiler processes: no GPU. A kernel is compiled for the architecture that its problem names.
_BLIND = {"CUDA_VISIBLE_DEVICES": ""}
#: Seconds between looks at whether anyone still works.
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Compilation:
    """One candidate's kernels for problems that differ in their lengths at most: mostly the same few kernels.

    Done one after another in one process, so that no kernel is compiled twice at a time.
    """

    candidate: Candidate
    recipes: tuple[ProblemRecipe, ...]
    arch: int


def processors() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compilations(fields: Iterable[tuple[Task, Sequence[Candidate]]]) -> list[Compilation]:
    """What is to be compiled for these problems and their candidates; launch modes share their kernels."""
    shared: dict[tuple[str, Any], tuple[Candidate, int, dict[Any, ProblemRecipe]]] = {}
    for task, candidates in fields:
        problem, recipe = task.problem, replace(task.recipe, mode="eager")
        family = replace(problem, mode="eager", profile=None)
        for candidate in candidates:
            _, _, recipes = shared.setdefault((candidate.name, family), (candidate, problem.arch, {}))
            recipes[recipe.case] = recipe
    return [Compilation(candidate, tuple(recipes.values()), arch) for candidate, arch, recipes in shared.values()]


def compile_ahead(
    work: Sequence[Compilation], jobs: int, limits: Limits | None = None, progress: Progress | None = None
) -> int:
    """Do ``work`` in ``jobs`` processes. Returns how many of it failed; each failure is noted.

    An interruption ends the processes.

    Raises:
        WorkerError: a process cannot be started.
    """
    progress, limits = progress or Progress(), limits or Limits()
    jobs = min(jobs, len(work))
    if not jobs:
        return 0
    progress.stage("compile", len(work))
    crew = [Worker("cpu", 1, limits, environment=_BLIND) for _ in range(jobs)]
    waiting: Queue[Compilation] = Queue()
    for one in work:
        waiting.put(one)
    reports: SimpleQueue[tuple[str, str]] = SimpleQueue()
    failed = 0
    with ThreadPoolExecutor(jobs, thread_name_prefix="compile") as pool:
        try:
            running = [pool.submit(_drain, worker, waiting, reports) for worker in crew]
            for _ in work:
                while (report := _next(reports)) is None:
                    if all(thread.done() for thread in running) and reports.empty():
                        running[0].result()  # none is left that works: its reason
                        raise WorkerError("the compiler processes are gone")
                name, failure = report
                if failure:
                    failed += 1
                    progress.note(f"{name}: not compiled ahead: {failure}")
                progress.advance(name)
        finally:
            while not waiting.empty():
                with contextlib.suppress(Empty):
                    waiting.get_nowait()
            for worker in crew:
                worker.end()  # a thread that waits for its answer goes on, and finds nothing more to do
    return failed


def _next(reports: SimpleQueue[tuple[str, str]]) -> tuple[str, str] | None:
    try:
        return reports.get(timeout=_LOOK_S)
    except Empty:
        return None


def _drain(worker: Worker, waiting: Queue[Compilation], reports: SimpleQueue[tuple[str, str]]) -> None:
    """In a thread: have ``worker`` do what there is, until there is no more."""
    with worker:
        while True:
            try:
                work = waiting.get_nowait()
            except Empty:
                return
            problems = [recipe.to_dict() for recipe in work.recipes]
            limit = worker.limits.bind * len(problems)
            failure = ""
            try:
                worker.request("compile", limit, **work.candidate.to_request(), problems=problems, arch=work.arch)
            except CandidateFailure as failed:
                failure = str(failed)
            reports.put((work.candidate.name, failure))
