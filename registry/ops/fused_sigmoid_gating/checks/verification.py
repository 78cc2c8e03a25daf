"""C1 and C2: verification, whose every step's state is kept, against plain calls."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ....conformance.check import Examination, check
from ....conformance.subject import Subject
from ..case import CaseSpec
from ..cases import FLOAT32
from .compare import Recipe, accurate, exact_for, same
from .kwargs import Kwargs, fresh, offsets_of, select_spans
from .trial import Results, Trial

__all__ = ["CHAIN", "CHECKS", "TREE"]


#: Draft tokens of four sequences: parents are drawn over earlier steps, one sequence stores nothing.
TREE = FLOAT32.but(name="tree", lengths=(5, 0, 8, 1, 4), padded=(4,), verify="tree", update="disabled")


CHAIN = TREE.but(name="chain", verify="chain")


@check("C1", "verification of a chain = running it step by step", relaxable=True)
def chain(subject: Subject) -> Iterator[Examination]:
    for spec in (CHAIN, CHAIN.but(name="kda, vk, in place", is_kda=True, state_layout="vk", update="in_place")):
        yield f"{spec.name}, every step", partial(_chain, subject, spec)
        yield f"{spec.name}, bound", partial(accurate, subject, Recipe(spec))
    low = CHAIN.but(name="low", io_dtype="bfloat16", gate_dtype="bfloat16", intermediate_dtype="bfloat16")
    yield "bfloat16 buffer", partial(accurate, subject, Recipe(low))


def _chain(subject: Subject, spec: CaseSpec) -> float | None:
    """The state after step t is that of a plain call on the first t + 1 tokens."""
    trial = Trial.of(spec, device=subject.device)
    got = trial.run(subject)
    trial.check_untouched()
    plain = spec.but(verify="none", update="in_place")
    worst = None
    for t in range(max(spec.lengths)):
        spans = [(n, 0, min(t + 1, length)) for n, length in enumerate(spec.lengths)]
        prefix = Trial(select_spans(fresh(plain, device=subject.device), plain, spans)).run(subject)
        states, steps = _at_step(spec, got, prefix, t)
        blank = (None,) * spec.n
        recipe = Recipe(plain, change=partial(_spans, spec=plain, spans=tuple(spans)))
        ratio = same(
            subject,
            "C1",
            Results(prefix.o, steps, blank),
            Results(prefix.o, states, blank),
            partial(exact_for, subject, recipe),
        )
        worst = ratio if worst is None else max(worst, ratio or 0.0)
    return worst


def _at_step(
    spec: CaseSpec, got: Results, prefix: Results, t: int
) -> tuple[tuple[torch.Tensor | None, ...], tuple[torch.Tensor | None, ...]]:
    """Per sequence that has a step t and stores it: the plain call's final state, and the stored step."""
    states: list[torch.Tensor | None] = [None] * spec.n
    steps: list[torch.Tensor | None] = [None] * spec.n
    for n, length in enumerate(spec.lengths):
        stored = got.steps[n]
        if length > t and stored is not None:
            states[n], steps[n] = prefix.states[n], stored[t]
    return tuple(states), tuple(steps)


def _spans(kwargs: Kwargs, spec: CaseSpec, spans: tuple[tuple[int, int, int], ...]) -> Kwargs:
    return select_spans(kwargs, spec, spans)


@check("C2", "verification of a tree = every path from its root alone", relaxable=True)
def tree(subject: Subject) -> Iterator[Examination]:
    for spec in (TREE, TREE.but(name="kda, vk", is_kda=True, state_layout="vk", index_dtype="int64")):
        yield f"{spec.name}, every path", partial(_paths, subject, spec)
        yield f"{spec.name}, bound", partial(accurate, subject, Recipe(spec))
    low = TREE.but(name="low", io_dtype="bfloat16", gate_dtype="bfloat16", intermediate_dtype="bfloat16")
    yield "bfloat16 buffer", partial(accurate, subject, Recipe(low))


def _paths(subject: Subject, spec: CaseSpec) -> float | None:
    """Each step's output and state, against a plain call on the tokens from the start to that step."""
    trial = Trial.of(spec, device=subject.device)
    got = trial.run(subject)
    trial.check_untouched()
    ref = exact_for(subject, Recipe(spec))
    assert trial.call.parents is not None
    parents = trial.call.parents.tolist()
    offsets = offsets_of(spec)
    plain = spec.but(verify="none", update="in_place")
    expected = Results(got.o.clone(), got.states, tuple(None if s is None else s.clone() for s in got.steps))
    for n, length in enumerate(spec.lengths):
        stored = expected.steps[n]
        for t in range(length if stored is not None else 0):
            path = [t]
            while path[0] > 0 and parents[n][path[0]] >= 0:
                path.insert(0, parents[n][path[0]])
            kwargs = _tokens(fresh(plain, device=subject.device), n, [offsets[n] + step for step in path])
            alone = Trial(kwargs).run(subject)
            expected.o[offsets[n] + t] = alone.o[-1]
            final = alone.states[0]
            if final is not None and stored is not None:
                stored[t] = final
    return same(subject, "C2", got, expected, lambda: ref)


def _tokens(kwargs: Kwargs, sequence: int, rows: list[int]) -> Kwargs:
    """One sequence made of these token rows."""
    at = torch.tensor(rows, device=kwargs["q"].device)
    changed = {name: kwargs[name][:, at] for name in ("q", "k", "v", "a", "b")}
    changed["initial_state_indices"] = kwargs["initial_state_indices"][sequence : sequence + 1]
    changed["cu_seqlens"] = torch.tensor([0, len(rows)], dtype=torch.int32, device=kwargs["q"].device)
    return {**kwargs, **changed}


CHECKS = (
    chain,
    tree,
)
