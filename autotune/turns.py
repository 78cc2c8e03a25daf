"""In what order a warm-up's problems are tuned, and when each can be: kernels are compiled meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ..registry.core import Registry
from .candidates import admit
from .compiling import Compilers, Field
from .progress import Progress

if TYPE_CHECKING:
    from .warmup import PlannedProblem, WarmupPlan

__all__ = ["Waiting", "in_turn", "ordered"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A problem to be tuned, with its candidates."""

    planned: PlannedProblem
    field: Field

    @classmethod
    def of(cls, registry: Registry, planned: PlannedProblem) -> Self:
        task = planned.task
        return cls(planned, (task, admit(registry, task.recipe.op, task.problem).candidates))

    @property
    def by_graph(self) -> bool:
        return self.planned.task.recipe.mode == "graph"


def ordered(plan: WarmupPlan, longest_first: bool) -> list[PlannedProblem]:
    """What is to be tuned, as the plan has it, but launch by graph first on a GPU.

    The device's clock does not mind that the host compiles, while a time that includes the host's does.

    Args:
        longest_first: of those by graph, so that a short one is left when the last kernels have been compiled. Not with
            a budget, which is for the most valuable.
    """
    todo = [p for p in plan.problems if not p.known]
    if plan.environment.device == "cpu":
        return todo
    graph = [p for p in todo if p.task.recipe.mode == "graph"]
    if longest_first:
        graph.sort(key=lambda p: -p.estimate_s)
    return graph + [p for p in todo if p.task.recipe.mode != "graph"]


def in_turn(waiting: Sequence[Waiting], crew: Compilers, progress: Progress) -> Iterator[PlannedProblem]:
    """Each problem when it can be tuned: by graph the first whose kernels are there, otherwise when all are.

    Raises:
        WorkerError: no process can be started that compiles.
    """
    left = list(waiting)
    while left:
        by_graph = [one for one in left if one.by_graph]
        fields = [one.field for one in by_graph]
        turn = crew.ready(fields)
        if turn is None and not crew.idle:
            progress.stage("compile", 1)
            if by_graph:
                turn = crew.first_ready(fields)
            else:
                crew.wait()
            progress.advance("compiled")
        while crew.failures:
            progress.note(f"not compiled ahead: {crew.failures.pop(0)}")
        chosen = left[0] if turn is None else by_graph[turn]
        left = [one for one in left if one is not chosen]
        yield chosen.planned
