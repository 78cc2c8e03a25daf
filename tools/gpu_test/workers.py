"""Processes that work off tasks and may die of them.

A kernel's illegal access ends its CUDA context, and with it whatever the process would have done next. So a process
that reported a failure, raised, hung or died is replaced; those whose tasks pass go on, and import and compile once.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .task import Budget, Outcome, Result, Task

__all__ = ["work_off"]

_SPAWN = multiprocessing.get_context("spawn")
#: Seconds for a process that was told to end to do so.
_GRACE = 5.0
#: Characters of a traceback that go into a report: its end says what was raised.
_QUOTED = 1500


def _serve(connection: Connection, perform: str) -> None:
    """A worker: tasks in, results out, until there are no more. A task that raises is its last one."""
    os.setsid()  # so that what it starts (assemblers, sanitizers) can be ended with it
    os.environ["OMP_NUM_THREADS"] = "1"  # for those; here torch is there already
    torch.set_num_threads(
        1
    )  # the processes are as many as the cores: references that share them take ten times as long
    module, _, name = perform.partition(":")
    run: Callable[[Task], Result] = getattr(importlib.import_module(module), name)
    while (task := connection.recv()) is not None:
        began = time.perf_counter()
        try:
            result = run(task)
        except Exception as error:
            faults = (f"{type(error).__name__}: {error}", traceback.format_exc()[-_QUOTED:])
            connection.send(Result(Outcome.FAIL, faults, seconds=time.perf_counter() - began))
            raise
        connection.send(replace(result, seconds=time.perf_counter() - began))


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Task | None = None
    began: float = 0.0

    @classmethod
    def start(cls, perform: str) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(theirs, perform), daemon=False)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, task: Task) -> None:
        self.task, self.began = task, time.monotonic()
        self.connection.send(task)

    @property
    def left(self) -> float:
        """Seconds until what it does counts as hung."""
        return self.began + self.task.limit - time.monotonic() if self.task is not None else math.inf

    def take(self) -> Result:
        """The result that has arrived, or what can be said of a process that is gone."""
        try:
            answer: Any = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(_GRACE)
            return Result(Outcome.FAIL, (f"the process ended with status {self.process.exitcode}",))
        assert isinstance(answer, Result)
        return answer

    def dismiss(self) -> None:
        """Tell it that there is nothing more to do."""
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def kill(self) -> None:
        """End it and all it has started."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(self.process.pid) == self.process.pid:
                    os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()  # it had no time to form a group of its own
        self.process.join()
        self.connection.close()


def work_off(
    tasks: Iterable[Task], jobs: int, budget: Budget, perform: str = "isokern.tools.gpu_test.perform:perform"
) -> Iterator[tuple[Task, Result]]:
    """Perform ``tasks`` in ``jobs`` processes, in order; yield each with its result as it comes.

    Args:
        perform: ``module:function`` that takes a Task and returns a Result.

    When the budget is spent, what runs is ended and everything left comes back as not run.
    """
    waiting = deque(tasks)
    workers: list[_Worker] = []
    try:
        while waiting or any(w.task for w in workers):
            _hand_out(waiting, workers, jobs, budget, perform)
            if budget.over:
                break
            yield from _collect(workers, budget)
        for worker in workers:
            if worker.task is not None:
                yield worker.task, Result(Outcome.NOT_RUN, note="ended when the budget was spent")
        for task in waiting:
            yield task, Result(Outcome.NOT_RUN, note="the budget was spent")
    finally:
        for worker in workers:
            if worker.task is None:
                worker.dismiss()
        for worker in workers:
            if worker.task is None:
                worker.process.join(_GRACE)
            worker.kill()


def _hand_out(waiting: deque[Task], workers: list[_Worker], jobs: int, budget: Budget, perform: str) -> None:
    idle = [w for w in workers if w.task is None]
    while waiting and not budget.over:
        if not idle:
            if len(workers) >= jobs:
                return
            workers.append(_Worker.start(perform))
            idle.append(workers[-1])
        idle.pop().give(waiting.popleft())


def _collect(workers: list[_Worker], budget: Budget) -> Iterator[tuple[Task, Result]]:
    """Wait for something to happen; yield what has finished, hung or died, and part with workers that are of no use."""
    busy = {w.connection: w for w in workers if w.task is not None}
    spare = math.inf if budget.left is None else budget.left
    ready = set(wait(list(busy), timeout=max(0.0, min(spare, *(w.left for w in busy.values())))))
    for connection, worker in busy.items():
        task = worker.task
        assert task is not None
        if connection in ready:
            result = worker.take()
        elif worker.left <= 0:
            result = Result(Outcome.FAIL, (f"no answer after {task.limit:g} s",), seconds=task.limit)
        else:
            continue
        worker.task = None
        if result.outcome is Outcome.FAIL:
            worker.kill()
            workers.remove(worker)
        yield task, result
