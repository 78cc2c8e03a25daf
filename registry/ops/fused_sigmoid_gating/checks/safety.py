"""S1 to S7: what a call may touch, and that stale or foreign memory never shows in its results."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch

from ....conformance.check import BackendRaised, Examination, Needs, Violation, check
from ....conformance.subject import Subject
from ..case import CaseSpec
from ..cases import BASE, FLOAT32, SCENARIOS
from ..dtypes import dtype_of
from ..validate import canonical_call
from .compare import Recipe, exact, same
from .kwargs import Kwargs, fresh, offsets_of, with_slots
from .trial import GUARD_ELEMENTS, Results, Trial

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


@check("S4", "NaN all around the inputs shows nowhere", needs=Needs.CPU)
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


@check("S5", "threads, their number and calls beside one another change no bit", needs=Needs.CPU, relaxable=True)
def threads(subject: Subject) -> Iterator[Examination]:
    wide = FLOAT32.but(name="wide", lengths=(1,) * 24, padded=(), hv=8)
    for spec in (FLOAT32.but(name="float32"), wide, BASE.but(name="kda", is_kda=True)):
        yield f"{spec.name}, 1 to 4 threads", partial(_any_threads, subject, spec)
        yield f"{spec.name}, two calls at once", partial(_at_once, subject, spec)


def _any_threads(subject: Subject, spec: CaseSpec) -> float | None:
    results = []
    for count in (1, 2, 4):
        with thread_count(subject, count):
            results.append(Trial.of(spec, device=subject.device).run(subject))
    worst = None
    for other in results[1:]:
        worst = _same_as(subject, spec, other, results[0]) or worst
    return worst


@contextmanager
def thread_count(subject: Subject, count: int) -> Iterator[None]:
    """Run torch, and numba where the backend needs it, on ``count`` threads (numba: at most as many as it runs now)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        if "numba" in subject.backend.requires:
            import numba

            held = numba.get_num_threads()
            numba.set_num_threads(min(count, held))
            try:
                yield
            finally:
                numba.set_num_threads(held)
        else:
            yield
    finally:
        torch.set_num_threads(before)


def _at_once(subject: Subject, spec: CaseSpec) -> float | None:
    """Two Python threads, each with a call of its own, must not see each other."""
    seeds = (0, 1)
    alone = [Trial.of(spec, seed, subject.device).run(subject) for seed in seeds]
    trials = [[Trial.of(spec, seed, subject.device) for _ in range(4)] for seed in seeds]
    got: list[list[Results]] = [[], []]
    raised: list[BackendRaised | Violation] = []
    together = threading.Barrier(len(seeds))

    def work(which: int) -> None:
        together.wait()
        try:
            for trial in trials[which]:
                got[which].append(trial.run(subject))
        except (BackendRaised, Violation) as error:
            raised.append(error)

    workers = [threading.Thread(target=work, args=(which,)) for which in range(len(seeds))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if raised:
        raise raised[0]
    worst = None
    for which, want in enumerate(alone):
        for one in got[which]:
            worst = _same_as(subject, spec, one, want, seeds[which]) or worst
    return worst


def _same_as(subject: Subject, spec: CaseSpec, got: Results, want: Results, seed: int = 0) -> float | None:
    recipe = Recipe(spec, seed)
    return same(subject, "S5", got, want, lambda: exact(recipe, subject.chunk(recipe.trial(subject).call)))


@check("S5E", "no schedule of the kernel's threads changes a bit", needs=Needs.ENGINE, relaxable=True)
def schedules(subject: Subject) -> Iterator[Examination]:
    for spec in (FLOAT32.but(name="float32"), BASE.but(name="kda", is_kda=True)):
        yield spec.name, partial(_any_schedule, subject, spec)


def _any_schedule(subject: Subject, spec: CaseSpec) -> float | None:
    assert subject.engine is not None
    recipe = Recipe(spec)
    trial = recipe.trial(subject)
    want = trial.run(subject)
    for name, active in subject.engine.schedules():
        with active():
            got = Trial.of(spec, device=subject.device).run(subject)
        try:
            same(subject, "S5E", got, want, lambda: exact(recipe, subject.chunk(trial.call)))
        except Violation as violation:
            raise Violation(f"schedule {name}: {violation}") from None
    return None


@check("S6", "offsets beyond 2**31 elements", needs=Needs.CPU)
def wide_offsets(subject: Subject) -> Iterator[Examination]:
    spec = CaseSpec("far", (3, 2), h=1, hv=2, k=32, v=24, state_dtype="bfloat16")
    for index in ("int32", "int64"):
        yield f"slots beyond 2**31, {index}", partial(_far_slots, subject, spec.but(index_dtype=index))
    yield "slot stride beyond 2**31, vk", partial(_far_slot_stride, subject, spec.but(state_layout="vk"))
    for name in ("q", "k", "v", "a", "b", "out"):
        yield f"token stride of {name}", partial(_far_tokens, subject, spec, name)


#: A storage of so many 16-bit elements is 5 GB of addresses, of which only the touched pages become memory.
_FAR = 5 * 2**29


def _far_slots(subject: Subject, spec: CaseSpec) -> float | None:
    """The last slots of a pool of more than 2**31 elements."""
    kwargs = fresh(spec, device=subject.device)
    want = Trial(fresh(spec, device=subject.device)).run(subject)
    pool, slots = kwargs["initial_state_source"], kwargs["initial_state_indices"]
    size = pool[0].numel()
    count = _FAR // size
    far = torch.empty(_FAR, dtype=pool.dtype)[: count * size].view(count, *pool.shape[1:])
    moved = [count - 1 - n for n in range(len(slots))]
    for n, slot in enumerate(moved):
        far[slot] = pool[int(slots[n])]
    return _far_run(subject, {**with_slots(kwargs, moved), "initial_state_source": far}, want)


def _far_slot_stride(subject: Subject, spec: CaseSpec) -> float | None:
    """Few slots, far apart: the slot stride, and not the slot number, makes the offset large."""
    kwargs = fresh(spec, device=subject.device)
    want = Trial(fresh(spec, device=subject.device)).run(subject)
    pool, slots = kwargs["initial_state_source"], kwargs["initial_state_indices"]
    stride = 2**30 + 64
    inner = pool[0].stride()
    far = torch.empty(_FAR, dtype=pool.dtype).as_strided((3, *pool.shape[1:]), (stride, *inner))
    for n, slot in enumerate((2, 1)):
        far[slot] = pool[int(slots[n])]
    return _far_run(subject, {**with_slots(kwargs, (2, 1)), "initial_state_source": far}, want)


def _far_tokens(subject: Subject, spec: CaseSpec, name: str) -> float | None:
    """A token stride that puts the last tokens beyond 2**31 elements."""
    kwargs = fresh(spec, device=subject.device)
    want = Trial(fresh(spec, device=subject.device)).run(subject)
    near = kwargs["v"] if name == "out" else kwargs[name]
    stride = 2**29 + 64
    inner = near[0, 0].stride()
    span = stride * (near.shape[1] - 1) + near[0, 0].numel()
    far = torch.empty(span, dtype=dtype_of(spec.io_dtype)).as_strided(near.shape, (span, stride, *inner))
    if name != "out":
        far.copy_(near)
    return _far_run(subject, {**kwargs, name: far}, want)


def _far_run(subject: Subject, kwargs: Kwargs, want: Results) -> float | None:
    """Run on storages too large to be remembered, so only values are compared."""
    call = canonical_call(**kwargs)
    if call.out is None:
        call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    subject.run(call)
    assert call.pool is not None
    assert call.write_slots is not None
    states = [call.pool[slot] for slot in call.write_slots.tolist()]
    if call.state_layout == "vk":
        states = [state.transpose(-1, -2) for state in states]
    got = Results(call.out.flatten(0, 1).clone(), tuple(s.clone() for s in states), (None,) * call.n)
    return same(subject, "S6", got, want)


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
    threads,
    schedules,
    wide_offsets,
    nothing_to_do,
)
