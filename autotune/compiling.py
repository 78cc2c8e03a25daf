"""Compiling ahead of measuring, in processes that see no GPU.

Kernels go where the backends' own caches find them. What fails here fails again when the candidate is bound, and gets
its verdict there. A problem waits for the kernels of its own candidates only, so that it can be tuned while those of
others are compiled.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from queue import SimpleQueue
from typing import Any, Self

from ..registry.accuracy import DEFAULT
from .candidates import Candidate
from .recipe import ProblemRecipe
from .tuner import Task
from .worker import CandidateFailure, Limits, Worker, WorkerError

__all__ = ["Compilation", "Compilers", "Field", "compilations", "processors"]

#: A problem with its candidates.
Field = tuple[Task, Sequence[Candidate]]

#: For the compiler processes: no GPU. A kernel is compiled for the architecture that its problem names.
_BLIND = {"CUDA_VISIBLE_DEVICES": ""}
#: Processors left to the processes that examine and time, and to the one that directs them.
_OTHERS = 3


def processors() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Compilation:
    """One candidate's kernels for problems that mostly share them.

    Done one after another in one process, so that no kernel is compiled twice at a time.
    """

    candidate: Candidate
    recipes: tuple[ProblemRecipe, ...]
    arch: int


def compilations(fields: Iterable[Field]) -> list[Compilation]:
    """What is to be compiled for these problems and their candidates, in their order.

    Launch modes share kernels, and so do policies. Of one problem's candidates the backends take turns: otherwise those
    of the backend whose compiler is slowest, which mostly come last, would begin when all others are done.
    """
    shared: dict[tuple[str, Any], tuple[Candidate, int, dict[Any, ProblemRecipe]]] = {}
    for task, candidates in fields:
        problem, recipe = task.problem, replace(task.recipe, mode="eager", accuracy=DEFAULT)
        one_token = problem.profile.longest == 1
        # What kernels are rarely specialised on: how much there is of everything.
        family = (one_token, replace(problem, mode="eager", accuracy=DEFAULT, profile=None, h=0, hv=0))
        for candidate in _by_turns(candidates):
            _, _, recipes = shared.setdefault((candidate.name, family), (candidate, problem.arch, {}))
            recipes[recipe.case] = recipe
    return [Compilation(candidate, tuple(recipes.values()), arch) for candidate, arch, recipes in shared.values()]


def _by_turns(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first candidate of each backend, the second of each, and so on."""
    by_backend: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_backend.setdefault(candidate.backend, []).append(candidate)
    return [c for turn in zip_longest(*by_backend.values()) for c in turn if c is not None]


class Compilers:
    """Processes that compile, and live until :meth:`close`; none before there is work.

    Args:
        jobs: how many; None: as many as there are processors for.

    Attributes: ``jobs``; ``failures``, a line for everything that did not compile.
    """

    def __init__(self, jobs: int | None = None, limits: Limits | None = None) -> None:
        self.jobs = max(1, processors() - _OTHERS) if jobs is None else jobs
        self._limits = limits or Limits()
        self._work: SimpleQueue[Compilation | None] = SimpleQueue()
        self._crew: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._pending: Counter[tuple[Any, str]] = Counter()  # what is not done, by case and candidate
        self._broken: WorkerError | None = None
        self._closed = False
        self.failures: list[str] = []

    def submit(self, work: Sequence[Compilation]) -> None:
        """Have this done, after what was submitted before."""
        with self._changed:
            for one in work:
                self._pending.update((recipe.case, one.candidate.name) for recipe in one.recipes)
        for one in work:
            self._work.put(one)
        for _ in range(min(self.jobs, len(work)) - len(self._threads)):
            worker = Worker("cpu", 1, self._limits, environment=_BLIND)
            thread = threading.Thread(target=self._serve, args=(worker,), name="compiler", daemon=True)
            self._crew.append(worker)
            self._threads.append(thread)
            thread.start()

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        with self._changed:
            return not +self._pending

    def wait(self) -> None:
        """Until all that was submitted is done.

        Raises:
            WorkerError: no process can be started.
        """
        self._wait_until(lambda: not +self._pending)

    def ready(self, fields: Sequence[Field]) -> int | None:
        """Index of the first of ``fields`` that nothing is left to compile for; None if there is no such one."""
        with self._changed:
            return self._ready(fields)

    def first_ready(self, fields: Sequence[Field]) -> int:
        """As :meth:`ready`, once there is one.

        Raises:
            WorkerError: no process can be started.
        """
        self._wait_until(lambda: self._ready(fields) is not None)
        index = self.ready(fields)
        assert index is not None  # what is compiled stays so
        return index

    def _ready(self, fields: Sequence[Field]) -> int | None:
        for index, (task, candidates) in enumerate(fields):
            if not any(self._pending[task.recipe.case, candidate.name] > 0 for candidate in candidates):
                return index
        return None

    def _wait_until(self, done: Callable[[], bool]) -> None:
        with self._changed:
            while not done():
                if self._broken is not None:
                    raise self._broken
                # With a limit, so that signals are seen.
                self._changed.wait(0.2)

    def close(self) -> None:
        """End the processes; what they are at is left undone. Idempotent."""
        self._closed = True
        for _ in self._threads:
            self._work.put(None)
        for worker in self._crew:
            worker.end()  # its thread, which waits for the answer, goes on
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._crew.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _serve(self, worker: Worker) -> None:
        """In a thread: have ``worker`` do what there is."""
        with worker:
            while not self._closed and (work := self._work.get()) is not None:
                try:
                    self._compile(worker, work)
                except WorkerError as error:
                    with self._changed:
                        self._broken = error
                        self._changed.notify_all()
                    return

    def _compile(self, worker: Worker, work: Compilation) -> None:
        """Problem by problem, so that none waits for another's kernels; what fails for one is not tried for the next.

        Raises: WorkerError.
        """
        failed = False
        for recipe in work.recipes:
            try:
                if not failed:
                    request = {**work.candidate.to_request(), "problems": [recipe.to_dict()], "arch": work.arch}
                    worker.request("compile", worker.limits.bind, **request)
            except CandidateFailure as failure:
                failed = True
                with self._changed:
                    if not self._closed:
                        self.failures.append(f"{work.candidate.name}: {failure}")
            with self._changed:
                self._pending[recipe.case, work.candidate.name] -= 1
                self._changed.notify_all()
