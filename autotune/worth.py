"""Which problems to tune first, who tunes what, and how long that takes. Decides only; imports no torch.

A warm-up with a budget should have done what serving spends its steps on. And several tuners that take the next problem
whenever they are free should not find the longest one last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .warmup import PlannedProblem

__all__ = ["Kind", "Unit", "deal", "kind_of", "makespan", "most_valuable_first", "units"]


class Kind(StrEnum):
    """What a server does in a step of such a batch."""

    DECODE = "decode"
    MIXED = "mixed"
    VERIFY = "verify"
    PREFILL = "prefill"


#: Share of a server's steps. In production traces of chat and code completion 70 to 94 % of all steps are pure decode,
#: nearly all others a prompt beside rows being decoded; a batch of prompts alone is a burst after idling. Verification
#: takes decode's place where drafting is on, which most deployments leave off.
STEP_SHARE = {Kind.DECODE: 0.80, Kind.MIXED: 0.12, Kind.VERIFY: 0.05, Kind.PREFILL: 0.03}


@dataclass(frozen=True, slots=True)
class Unit:
    """Problems that one tuner takes together: the launch modes of one case, whose candidates are gated once.

    Attributes: ``problems``, at least one, launch by graph first, which tells who is too slow for any other; ``value``,
    share of the steps it stands for; ``seconds``, estimated.
    """

    problems: tuple[PlannedProblem, ...]
    value: float
    seconds: float


def kind_of(lengths: Sequence[int], verify: str = "none") -> Kind:
    """The kind of batch that packs ``lengths`` tokens; ``verify`` as in the op's case."""
    if verify != "none":
        return Kind.VERIFY
    if max(lengths, default=0) <= 1:
        return Kind.DECODE
    return Kind.MIXED if 1 in lengths else Kind.PREFILL


def units(problems: Iterable[PlannedProblem]) -> tuple[Unit, ...]:
    """The problems that need tuning, most valuable first; of equals the longest, then the one listed first."""
    groups: dict[object, list[PlannedProblem]] = {}
    for planned in problems:
        if not planned.known:
            groups.setdefault(planned.task.recipe.case, []).append(planned)
    for group in groups.values():
        group.sort(key=lambda p: p.task.recipe.mode != "graph")
    found = [Unit(tuple(g), sum(map(_value, g)) / len(g), sum(p.estimate_s for p in g)) for g in groups.values()]
    return tuple(sorted(found, key=lambda unit: (-unit.value, -unit.seconds)))


def most_valuable_first(problems: Sequence[PlannedProblem]) -> tuple[PlannedProblem, ...]:
    """All of ``problems``: those that need no tuning, then the others in the order of :func:`units`."""
    known = [p for p in problems if p.known]
    return (*known, *(p for unit in units(problems) for p in unit.problems))


def _value(planned: PlannedProblem) -> float:
    case = planned.task.recipe.case
    return STEP_SHARE[kind_of(case.lengths, case.verify)] * len(planned.cases)


def deal(work: Sequence[Unit], tuners: int) -> tuple[tuple[Unit, ...], ...]:
    """Who takes what if nobody can ask for more: in order, each to the one with least to do (the first of equals)."""
    hands: list[list[Unit]] = [[] for _ in range(tuners)]
    busy = [0.0] * tuners
    for unit in work:
        least = min(range(tuners), key=busy.__getitem__)
        hands[least].append(unit)
        busy[least] += unit.seconds
    return tuple(map(tuple, hands))


def makespan(work: Sequence[Unit], tuners: int) -> float:
    """Seconds until all is done, if each of ``tuners`` takes the next unit when it is free."""
    return max((sum(unit.seconds for unit in hand) for hand in deal(work, tuners)), default=0.0)
