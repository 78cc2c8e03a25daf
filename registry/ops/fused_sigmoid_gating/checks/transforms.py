"""M5 to M10: transformations of the values, or of one head or column, that pass through bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ....conformance.check import Examination, Violation, check
from ....conformance.subject import Subject
from ..case import CaseSpec
from ..cases import FLOAT32
from .compare import Recipe, accurate, same
from .kwargs import permute_values, to_head
from .relations import RELATION_CASES, gates_at, run, same_case, times, without_state
from .trial import Results, bits

__all__ = ["CHECKS"]


@check("M5", "one value head alone = that head of the whole", relaxable=True)
def one_head(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        for head in (0, 1, spec.hv - 1):
            yield f"{spec.name}, head {head}", partial(_one_head, subject, spec, head)
    odd = FLOAT32.but(name="H = 3, HV = 9", h=3, hv=9, k=24, v=16)
    yield f"{odd.name}, head 5", partial(_one_head, subject, odd, 5)


def _one_head(subject: Subject, spec: CaseSpec, head: int) -> float | None:
    part = run(subject, spec, partial(to_head, head=head, spec=spec))
    whole = run(subject, spec)
    # Put the head's results into the whole's, so that the reference of the whole applies.
    o = whole.o.clone()
    o[:, head : head + 1] = part.o
    states: list[torch.Tensor | None] = []
    for mine, all_heads in zip(part.states, whole.states, strict=True):
        patched = None if all_heads is None else all_heads.clone()
        if mine is not None and patched is not None:
            patched[head : head + 1] = mine
        states.append(patched)
    return same_case(subject, "M5", Results(o, tuple(states), whole.steps), whole, spec)


@check("M6", "permuting value columns permutes outputs and states", relaxable=True)
def permuted_columns(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield spec.name, partial(_permuted_columns, subject, spec)


def _permuted_columns(subject: Subject, spec: CaseSpec) -> float | None:
    order = torch.randperm(spec.v, generator=torch.Generator().manual_seed(6))
    back = torch.argsort(order)
    got = run(subject, spec, partial(permute_values, order=order))
    states = tuple(None if s is None else s[..., back] for s in got.states)
    return same_case(subject, "M6", Results(got.o[..., back], states, got.steps), run(subject, spec), spec)


@check("M7", "powers of two pass through: of the scale, and of values and states", relaxable=True)
def powers_of_two(subject: Subject) -> Iterator[Examination]:
    factor = 64.0
    for case in RELATION_CASES:
        # Subnormals of float16 round differently after scaling.
        spec = case.but(io_dtype="bfloat16") if case.io_dtype == "float16" else case
        yield f"{spec.name}, scale", partial(_scaled_query, subject, spec, factor)
        yield f"{spec.name}, values and states", partial(_transformed, subject, "M7", spec, factor, factor, 1.0)


def _scaled_query(subject: Subject, spec: CaseSpec, factor: float) -> float | None:
    base = spec.k**-0.5
    got = run(subject, spec.but(scale=base * factor))
    want = run(subject, spec.but(scale=base))
    return same_case(subject, "M7", Results(got.o / factor, got.states, got.steps), want, spec)


@check("M8", "sign flips: of q; of values and states; of keys and states", relaxable=True)
def signs(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield f"{spec.name}, q", partial(_flipped_query, subject, spec)
        yield f"{spec.name}, v and state", partial(_transformed, subject, "M8", spec, -1.0, -1.0, 1.0)
        yield f"{spec.name}, k and state", partial(_flipped_keys, subject, spec)


def _flipped_query(subject: Subject, spec: CaseSpec) -> float | None:
    got = run(subject, spec, partial(times, q=-1.0))
    return same_case(subject, "M8", Results(-got.o, got.states, got.steps), run(subject, spec), spec)


def _flipped_keys(subject: Subject, spec: CaseSpec) -> float | None:
    """k -> -k, S -> -S, v as it is: the prediction S^T k stays, the update k u^T flips, and o with it."""
    got = run(subject, spec, partial(times, k=-1.0, initial_state_source=-1.0))
    states = tuple(None if s is None else -s for s in got.states)
    return same_case(subject, "M8", Results(-got.o, states, got.steps), run(subject, spec), spec)


def _transformed(
    subject: Subject, check_id: str, spec: CaseSpec, values: float, state: float, query: float
) -> float | None:
    got = run(subject, spec, partial(times, v=values, initial_state_source=state, q=query))
    states = tuple(None if s is None else s / state for s in got.states)
    return same_case(subject, check_id, Results(got.o / (state * query), states, got.steps), run(subject, spec), spec)


@check("M9", "an identity gate leaves the pool as it is")
def identity_gate(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield spec.name, partial(_identity, subject, spec)
    yield "kda, bounded", partial(_identity, subject, FLOAT32.but(name="bounded", is_kda=True, lower_bound=-5.0))


def _identity(subject: Subject, spec: CaseSpec) -> float | None:
    """a = b = -200: the decay is 1 and beta 0, so the pool keeps its bits and o = scale * S0^T q."""
    change = partial(gates_at, a=-200.0, b=-200.0, dt_bias=0.0)
    trial = Recipe(spec, change=change).trial(subject)
    assert trial.call.pool is not None
    before = trial.call.pool.clone()
    trial.run(subject)
    if not torch.equal(bits(before.contiguous()), bits(trial.call.pool.contiguous())):
        raise Violation(f"{int((before != trial.call.pool).sum())} values of the pool changed")
    return accurate(subject, Recipe(spec, change=change))


@check("M10", "an erasing gate forgets the initial state")
def erasing_gate(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield spec.name, partial(_erased, subject, spec)


def _erased(subject: Subject, spec: CaseSpec) -> float | None:
    """A_log = 5, a = 200: the decay is 0, so nothing of the (finite) initial state is left."""
    change = partial(gates_at, a=200.0, A_log=5.0, dt_bias=0.0)
    given = run(subject, spec, change)
    other = run(subject, spec, lambda kwargs: change(times(kwargs, initial_state_source=-3.0)))
    for n, length in enumerate(spec.lengths):
        if length == 0:  # its state is not forgotten, only kept
            given, other = without_state(given, n), without_state(other, n)
    return same(subject, "M10", other, given)


CHECKS = (
    one_head,
    permuted_columns,
    powers_of_two,
    signs,
    identity_gate,
    erasing_gate,
)
