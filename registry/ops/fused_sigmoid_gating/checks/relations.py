"""What the metamorphic checks share: the calls they are tried on, and how two results of one are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ....conformance.subject import Subject
from ..case import CaseSpec
from ..cases import BASE, DECODE, FLOAT32
from .compare import Recipe, exact_for, same
from .kwargs import Kwargs, Span, select_spans
from .trial import Results

__all__ = ["RELATION_CASES", "Change", "gates_at", "largest", "run", "same_case", "spans_of", "times", "without_state"]


#: Calls the relations are tried on: several dtypes, both layouts, both kinds of gate, prompts and decode.
RELATION_CASES: tuple[CaseSpec, ...] = (
    FLOAT32.but(name="float32"),
    BASE.but(name="bfloat16, kda, vk", is_kda=True, state_layout="vk"),
    DECODE,
    BASE.but(name="float16 in, bfloat16 pool", io_dtype="float16", gate_dtype="float32", state_dtype="bfloat16"),
)


Change = Callable[[Kwargs], Kwargs]


def run(subject: Subject, spec: CaseSpec, change: Change | None = None) -> Results:
    """A fresh call of the case, changed, run once."""
    return Recipe(spec, change=change).trial(subject).run(subject)


def same_case(subject: Subject, check_id: str, got: Results, want: Results, spec: CaseSpec) -> float | None:
    """``got`` and ``want`` both describe the case itself."""
    return same(subject, check_id, got, want, partial(exact_for, subject, Recipe(spec)))


def largest(x: float | None, y: float | None) -> float | None:
    """The larger ratio; None stands for equal bits."""
    return y if x is None else x if y is None else max(x, y)


def times(kwargs: Kwargs, **factors: float) -> Kwargs:
    """The named tensors multiplied by their factors."""
    return {**kwargs, **{name: kwargs[name] * factor for name, factor in factors.items()}}


def gates_at(kwargs: Kwargs, **values: float) -> Kwargs:
    """The named tensors filled with one value each."""
    return {**kwargs, **{name: torch.full_like(kwargs[name], value) for name, value in values.items()}}


def without_state(results: Results, n: int) -> Results:
    """The results without the final state of sequence ``n``."""
    states = tuple(None if i == n else s for i, s in enumerate(results.states))
    return Results(results.o, states, results.steps)


def spans_of(kwargs: Kwargs, spec: CaseSpec, spans: tuple[Span, ...]) -> Kwargs:
    """As :func:`select_spans`, with the arguments in the order a recipe needs."""
    return select_spans(kwargs, spec, spans)
