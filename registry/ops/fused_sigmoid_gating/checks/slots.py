"""C3 to C5 and C15: which slots are read, which are written, and which must not be touched."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ....conformance.check import Examination, check
from ....conformance.subject import Subject
from ..case import CaseSpec
from ..cases import BASE, FLOAT32
from ..inputs import make_inputs
from .compare import Recipe, accurate, exact_for, same
from .kwargs import Kwargs, with_slots
from .trial import Results, Trial

__all__ = ["CHECKS", "accurate_and_untouched"]


@check("C3", "a disabled update computes the same output and writes nothing", relaxable=True)
def disabled_update(subject: Subject) -> Iterator[Examination]:
    for spec in (FLOAT32, BASE.but(name="kda, vk", is_kda=True, state_layout="vk"), BASE.but(state_dtype="bfloat16")):
        yield f"{spec.name}, {spec.state_dtype}", partial(_disabled, subject, spec)


def _disabled(subject: Subject, spec: CaseSpec) -> float | None:
    trial = Trial.of(spec.but(update="disabled"), device=subject.device)
    got = trial.run(subject)
    trial.check_untouched()
    want = Trial.of(spec, device=subject.device).run(subject)
    stored_nothing = Results(want.o, (None,) * spec.n, want.steps)
    return same(subject, "C3", got, stored_nothing, partial(exact_for, subject, Recipe(spec)))


SEPARATE = FLOAT32.but(name="separate", update="separate", fresh=(0,))


@check("C4", "separate slots: read slots keep their bits, written ones hold the result", relaxable=True)
def separate_slots(subject: Subject) -> Iterator[Examination]:
    for spec in (SEPARATE, SEPARATE.but(name="bfloat16 pool, vk", state_dtype="bfloat16", state_layout="vk")):
        yield f"{spec.name}, bound", partial(accurate, subject, Recipe(spec))
        yield f"{spec.name}, same results", partial(_separate, subject, spec)
    yield "one slot read by all", partial(accurate, subject, Recipe(SEPARATE, change=_one_source))
    yield "one slot read by all, untouched", partial(_untouched, subject, Recipe(SEPARATE, change=_one_source))
    yield "equal slots, said twice", partial(accurate, subject, Recipe(SEPARATE, change=_written_where_read))
    yield "read one, store nothing", partial(_untouched, subject, Recipe(SEPARATE, change=_stored_nowhere))


def _separate(subject: Subject, spec: CaseSpec) -> float | None:
    """As if each state had been copied to the slot it is written to, and updated there."""
    trial = Trial.of(spec, device=subject.device)
    got = trial.run(subject)
    trial.check_untouched()
    recipe = Recipe(spec, change=_copied_first)
    want = recipe.trial(subject).run(subject)
    empty = [n for n, length in enumerate(spec.lengths) if not length]
    for n in empty:  # nothing is copied for an empty sequence: its written slot keeps what it held
        want = Results(want.o, tuple(got.states[i] if i == n else s for i, s in enumerate(want.states)), want.steps)
    return same(subject, "C4", got, want, partial(exact_for, subject, recipe))


def _copied_first(kwargs: Kwargs) -> Kwargs:
    pool, read = kwargs["initial_state_source"], kwargs["initial_state_indices"].tolist()
    write = kwargs.pop("output_state_indices")
    for source, target in zip(read, write.tolist(), strict=True):
        if target >= 0:
            pool[target] = pool[source] if source >= 0 else 0
    return {**kwargs, "initial_state_indices": write}


def _one_source(kwargs: Kwargs) -> Kwargs:
    read = kwargs["initial_state_indices"]
    return {**kwargs, "initial_state_indices": torch.full_like(read, int(read.max()))}


def _written_where_read(kwargs: Kwargs) -> Kwargs:
    return {**kwargs, "output_state_indices": kwargs["initial_state_indices"].clone()}


def _stored_nowhere(kwargs: Kwargs) -> Kwargs:
    return {**kwargs, "output_state_indices": torch.full_like(kwargs["output_state_indices"], -1)}


def _untouched(subject: Subject, recipe: Recipe) -> None:
    trial = recipe.trial(subject)
    trial.run(subject)
    trial.check_untouched()


@check("C5", "a sequence that starts from zero reads no state")
def zero_start(subject: Subject) -> Iterator[Examination]:
    yield "fresh and padded, NaN in all other slots", partial(_zero_start, subject, SEPARATE)
    yield "padded, NaN in all other slots", partial(_zero_start, subject, FLOAT32)
    yield "bfloat16 pool", partial(_zero_start, subject, SEPARATE.but(state_dtype="bfloat16", is_kda=True))


def _zero_start(subject: Subject, spec: CaseSpec) -> float | None:
    """All slots nobody reads hold NaN, the guards around the pool included: any contact shows."""
    clean = Trial.of(spec, device=subject.device).run(subject)
    inputs = make_inputs(spec, device=subject.device)
    assert inputs.pool_storage is not None
    pool = inputs.kwargs["initial_state_source"]
    read = {slot for slot in inputs.kwargs["initial_state_indices"].tolist() if slot >= 0}
    kept = {slot: pool[slot].clone() for slot in read}
    inputs.pool_storage.fill_(float("nan"))
    for slot, state in kept.items():
        pool[slot] = state
    got = Trial(inputs.kwargs).run(subject)
    idle = [n for n, length in enumerate(spec.lengths) if not length]
    return same(subject, "C5", _without(got, idle), _without(clean, idle))


def _without(results: Results, idle: list[int]) -> Results:
    """Without the states of sequences that have no token: their slots hold NaN now."""
    states = tuple(None if n in idle else s for n, s in enumerate(results.states))
    return Results(results.o, states, results.steps)


@check("C15", "slots in any order, far apart, the first and the last")
def slot_orders(subject: Subject) -> Iterator[Examination]:
    spec = FLOAT32.but(name="slots", lengths=(3, 2, 4), padded=(), extra_slots=6)
    for slots in ((0, 1, 2), (8, 0, 4), (2, 1, 0), (8, 7, 6), (-1, 8, -1), (-1, -1, -1), (-7, 0, -2)):
        change = partial(with_slots, slots=slots)
        yield str(slots), partial(accurate_and_untouched, subject, Recipe(spec, change=change))


def accurate_and_untouched(subject: Subject, recipe: Recipe) -> float:
    _untouched(subject, recipe)
    return accurate(subject, recipe)


CHECKS = (
    disabled_update,
    separate_slots,
    zero_start,
    slot_orders,
)
