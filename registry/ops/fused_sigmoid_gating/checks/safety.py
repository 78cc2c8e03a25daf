"""S1 to S4 and S7: what a call may touch, and that stale or foreign memory never shows in its results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch

from ....conformance.check import Examination, Needs, Violation, check
from ....conformance.subject import Subject
from ..case import CaseSpec
from ..cases import BASE, FLOAT32, SCENARIOS
from .compare import same
from .kwargs import fresh, offsets_of, with_slots
from .trial import GUARD_ELEMENTS, Trial

__all__ = ["CHECKS", "large_poison", "poisoned", "untouched"]


#: What may be written differs between these: in place, elsewhere, nothing, steps, rows beyond the last offset.
WRITING_CASES: tuple[CaseSpec, ...] = (
    BASE.but(name="in place", extra_rows=3),
    FLOAT32.but(name="in place, float32, strided rows", strides="rows", extra_rows=2),
    BASE.but(name="separate slots", update="separate", fresh=(0,), state_layout="vk"),
    BASE.but(name="read only, kda", update="disabled", is_kda=True),
    BASE.but(name="float16 pool", io_dtype="float16", state_dtype="float16", strides="any"),
    BASE.but(name="batch", varlen=False, lengths=(4, 4, 4), padded=(1,)),
    BASE.but(name="chain", lengths=(3, 0, 5, 1), padded=(3,), verify="chain", update="disabled"),
    BASE.but(name="tree in place", lengths=(3, 0, 7, 1), padded=(3,), verify="tree"),
    SCENARIOS["decode"],
    SCENARIOS["all empty"],
)


def large_poison(spec: CaseSpec) -> float:
    """1e30, or the nearest that float16 can hold."""
    return 6e4 if spec.io_dtype == "float16" else 1e30


@check("S1", "a poisoned output shows nowhere, and stays where no sequence writes")
def output_poison(subject: Subject) -> Iterator[Examination]:
    for spec in WRITING_CASES:
        yield spec.name, partial(poisoned, subject, spec)


def poisoned(subject: Subject, spec: CaseSpec) -> float | None:
    """NaN in the output first, then a large number: equal results, no NaN, the poison kept beyond the last row."""
    runs = []
    for poison in (math.nan, large_poison(spec)):
        trial = Trial.of(spec, device=subject.device)
        runs.append(trial.run(subject, poison))
        trial.check_output()
    left = int(torch.isnan(runs[0].o).sum())
    if left:
        raise Violation(f"{left} of {runs[0].o.numel()} outputs are NaN: never written, or computed from stale memory")
    return same(subject, "S1", runs[1], runs[0])


@check("S2", "inputs, unnamed slots and everything around the written places keep their bits")
def canaries(subject: Subject) -> Iterator[Examination]:
    for spec in WRITING_CASES:
        yield spec.name, partial(untouched, subject, spec)
    yield "slots 0,2,1 of 5", partial(untouched, subject, SCENARIOS["slots 0,2,1 of 5"], (0, 2, 1))


def untouched(subject: Subject, spec: CaseSpec, slots: tuple[int, ...] = ()) -> None:
    """Run the case (on these slots) and compare every byte of every storage that may not change."""
    kwargs = fresh(spec, device=subject.device)
    trial = Trial(with_slots(kwargs, slots) if slots else kwargs)
    trial.run(subject)
    trial.check_untouched()


@check("S3", "the same pointers with new contents give new results")
def same_pointers(subject: Subject) -> Iterator[Examination]:
    for spec in (FLOAT32.but(name="float32"), BASE.but(name="kda", is_kda=True), SCENARIOS["decode"]):
        yield spec.name, partial(_refilled, subject, spec)


def _refilled(subject: Subject, spec: CaseSpec) -> float | None:
    """Fill a used call's tensors with another call's values (other offsets and slots too) and run it again."""
    turned = spec.but(lengths=spec.lengths[::-1], padded=tuple(spec.n - 1 - n for n in spec.padded))
    kwargs, other = fresh(spec, 0, subject.device), fresh(turned, 1, subject.device)
    first = Trial(kwargs)
    first.run(subject)
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            kwargs[name].copy_(value)
    got = Trial({**kwargs, "out": first.out}).run(subject)
    want = Trial.of(turned, 1, subject.device).run(subject)
    return same(subject, "S3", got, want)


@check("S4", "NaN all around the inputs shows nowhere", needs=Needs.HOST)
def surroundings(subject: Subject) -> Iterator[Examination]:
    for spec in (*WRITING_CASES, BASE.but(name="65 tokens", lengths=(65, 1), padded=(), h=1, hv=2)):
        yield spec.name, partial(_surrounded, subject, spec)


def _surrounded(subject: Subject, spec: CaseSpec) -> float | None:
    """Every input lies in a larger storage of NaN (indices: of huge numbers), gaps between its strides included."""
    want = Trial.of(spec, device=subject.device).run(subject)
    trial = Trial({name: _islanded(value) for name, value in fresh(spec, device=subject.device).items()})
    got = trial.run(subject)
    trial.check_untouched()
    return same(subject, "S4", got, want)


def _islanded(value: object) -> object:
    """A copy with the same shape and strides in the middle of a larger storage that must not be read."""
    if not isinstance(value, torch.Tensor):
        return value
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    around = math.nan if value.is_floating_point() else torch.iinfo(value.dtype).max
    storage = torch.full((span + 2 * GUARD_ELEMENTS,), around, dtype=value.dtype, device=value.device)
    return storage.as_strided(value.shape, value.stride(), GUARD_ELEMENTS).copy_(value)


@check("S4E", "no access outside the tensors given", needs=Needs.ENGINE)
def watched_addresses(subject: Subject) -> Iterator[Examination]:
    for spec in WRITING_CASES:
        yield spec.name, partial(_watched, subject, spec)


def _watched(subject: Subject, spec: CaseSpec) -> None:
    assert subject.engine is not None
    trial = Trial.of(spec, device=subject.device)
    with subject.engine.watch_addresses(trial.call.tensors()):
        trial.run(subject)


@check("S7", "no sequence, no token: valid, and nothing is written")
def nothing_to_do(subject: Subject) -> Iterator[Examination]:
    empty = BASE.but(lengths=(), padded=())
    for name, spec in (
        ("N = 0, packed", empty),
        ("N = 0, rows to spare", empty.but(extra_rows=2)),
        ("N = 0, batch", empty.but(varlen=False)),
        ("T = 0, packed", BASE.but(lengths=(0, 0, 0), padded=(1,))),
        ("T = 0, batch", BASE.but(lengths=(0, 0), padded=(), varlen=False)),
        ("T = 0, stateless", BASE.but(lengths=(0,), padded=(), state_dtype=None)),
        ("T = 0, kda, chain", BASE.but(lengths=(0, 0), padded=(), is_kda=True, verify="chain")),
    ):
        yield name, partial(_nothing_written, subject, spec)


def _nothing_written(subject: Subject, spec: CaseSpec) -> None:
    trial = Trial.of(spec, device=subject.device)
    results = trial.run(subject)
    assert results.o.shape[0] == offsets_of(spec)[-1] == 0
    assert not any(y > x for x, y in pairwise(trial.offsets))
    trial.check_untouched()


CHECKS = (
    output_poison,
    canaries,
    same_pointers,
    surroundings,
    watched_addresses,
    nothing_to_do,
)
