"""M1 to M4, M11 and M12: repeating, packing, cutting, permuting and restating a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch

from ....conformance.check import Examination, Violation, check
from ....conformance.subject import Subject
from ....varlen.layout import SequenceLayout
from ..case import CaseSpec
from ..cases import BASE, FLOAT32, SCENARIOS
from ..inputs import make_inputs
from .compare import Recipe
from .kwargs import Kwargs, fresh, select_spans
from .relations import RELATION_CASES, Change, largest, run, same_case, spans_of, without_state
from .trial import Results, Trial, bits

__all__ = ["CHECKS", "packed_equals_alone"]


@check("M1", "three runs give the same bits, other work beside them or not", promise="repeatable", relaxable=True)
def repeatable(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield spec.name, partial(_repeats, subject, spec)
    yield "beside other work", partial(_repeats_beside_work, subject, FLOAT32)


def _repeats(subject: Subject, spec: CaseSpec, runs: int = 3) -> float | None:
    first = run(subject, spec)
    worst = None
    for _ in range(runs - 1):
        worst = largest(worst, same_case(subject, "M1", run(subject, spec), first, spec))
    return worst


def _repeats_beside_work(subject: Subject, spec: CaseSpec) -> float | None:
    """Another thread (on a GPU: another stream) multiplies matrices meanwhile."""
    stop = threading.Event()
    m = torch.full((64, 64), 0.5, device=subject.device)

    def work() -> None:
        stream = _stream(subject.device) if subject.device.type == "cuda" else None
        with torch.cuda.stream(stream):
            while not stop.is_set():
                torch.mm(m, m)
                if stream is not None:
                    stream.synchronize()

    other = threading.Thread(target=work, daemon=True)
    other.start()
    try:
        return _repeats(subject, spec)
    finally:
        stop.set()
        other.join()


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


@check("M2", "packed sequences = each sequence alone", promise="batch_invariant", relaxable=True)
def packed_alone(subject: Subject) -> Iterator[Examination]:
    for spec in (*RELATION_CASES, SCENARIOS["packed 5,7,6"], SCENARIOS["one long, many short"]):
        yield spec.name, partial(packed_equals_alone, subject, spec)


def packed_equals_alone(subject: Subject, spec: CaseSpec) -> float | None:
    """Run the packed call, then each of its sequences in a call of its own from the same states."""
    together = run(subject, spec)
    alone = [run(subject, spec, partial(spans_of, spec=spec, spans=((n, 0, spec.lengths[n]),))) for n in range(spec.n)]
    return same_case(subject, "M2", _joined(alone), together, spec)


def _joined(parts: list[Results]) -> Results:
    return Results(
        torch.cat([part.o for part in parts]),
        tuple(state for part in parts for state in part.states),
        tuple(step for part in parts for step in part.steps),
    )


@check("M3", "a sequence cut anywhere, its state carried through the pool = the whole", relaxable=True)
def cut(subject: Subject) -> Iterator[Examination]:
    for spec in (
        FLOAT32.but(name="float32", lengths=(12,), padded=()),
        BASE.but(name="bfloat16, kda", lengths=(12,), padded=(), is_kda=True, state_layout="vk"),
    ):
        for at in (1, 5, 11):
            yield f"{spec.name}, at {at}", partial(_cut, subject, spec, (at,))
        yield f"{spec.name}, token by token", partial(_cut, subject, spec, tuple(range(1, 12)))
    long = FLOAT32.but(name="long", lengths=(70,), padded=(), h=1, hv=2)
    yield "70 tokens, at 64", partial(_cut, subject, long, (64,))
    yield "70 tokens, at 33", partial(_cut, subject, long, (33,))


def _cut(subject: Subject, spec: CaseSpec, at: tuple[int, ...]) -> float | None:
    whole = run(subject, spec)
    kwargs = fresh(spec, device=subject.device)
    edges = (0, *at, spec.lengths[0])
    outputs, last = [], None
    for first, end in pairwise(edges):
        last = Trial(select_spans(kwargs, spec, [(0, first, end)])).run(subject)  # one pool for all of them
        outputs.append(last.o)
    assert last is not None
    return same_case(subject, "M3", Results(torch.cat(outputs), last.states, last.steps), whole, spec)


@check("M4", "permuting sequences permutes outputs and states", promise="batch_invariant", relaxable=True)
def permuted(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        for order in ((4, 3, 2, 1, 0), (2, 4, 0, 3, 1)):
            yield f"{spec.name}, {order}", partial(_permuted, subject, spec, order)


def _permuted(subject: Subject, spec: CaseSpec, order: tuple[int, ...]) -> float | None:
    spans = tuple((n, 0, spec.lengths[n]) for n in order)
    got = run(subject, spec, partial(spans_of, spec=spec, spans=spans))
    chunks = dict(zip(order, torch.split(got.o, [spec.lengths[n] for n in order]), strict=True))
    states = dict(zip(order, got.states, strict=True))
    back = Results(
        torch.cat([chunks[n] for n in range(spec.n)]), tuple(states[n] for n in range(spec.n)), (None,) * spec.n
    )
    return same_case(subject, "M4", back, run(subject, spec), spec)


@check("M11", "slot -1 is a zero start without a store; an empty sequence keeps its state")
def padding_and_empty(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield f"{spec.name}, slot -1", partial(_padded, subject, spec)
        yield f"{spec.name}, empty", partial(_empty_keeps, subject, spec)


def _padded(subject: Subject, spec: CaseSpec) -> float | None:
    """The sequence without a slot gives the same output as one whose slot holds zeros, and leaves the pool alone."""
    (n,) = spec.padded
    zeroed = spec.but(padded=())
    whole = spec.but(padded=(n,))
    trial = Recipe(whole).trial(subject)
    got = trial.run(subject)
    trial.check_untouched()

    def zero_slot(kwargs: Kwargs) -> Kwargs:
        kwargs["initial_state_source"][int(kwargs["initial_state_indices"][n])] = 0
        return kwargs

    want = run(subject, zeroed, zero_slot)
    return same_case(subject, "M11", got, without_state(want, n), spec)


def _empty_keeps(subject: Subject, spec: CaseSpec) -> None:
    trial = Recipe(spec).trial(subject)
    call = trial.call
    assert call.pool is not None
    assert call.read_slots is not None
    before = call.pool.clone()
    trial.run(subject)
    for n, length in enumerate(spec.lengths):
        slot = int(call.read_slots[n])
        if length == 0 and slot >= 0 and not torch.equal(bits(before[slot]), bits(call.pool[slot])):
            raise Violation(f"the state of empty sequence {n} (slot {slot}) changed")


@check("M12", "the same call said in another way: batch, index dtype, layout, strides", relaxable=True)
def same_call(subject: Subject) -> Iterator[Examination]:
    equal = FLOAT32.but(name="equal lengths", lengths=(6, 6, 6), padded=(1,))
    yield "batch = packed", partial(_batch, subject, equal)
    yield "batch = packed, kda", partial(_batch, subject, BASE.but(lengths=(3, 3), padded=(), is_kda=True))
    for spec in RELATION_CASES:
        for what, other in (
            ("int64 slots", spec.but(index_dtype="int64")),
            ("int64 offsets", spec.but(cu_dtype="int64")),
            ("SequenceLayout", spec.but(as_layout=True)),
            ("strided rows", spec.but(strides="rows")),
            ("strided", spec.but(strides="any")),
            ("rows to spare", spec.but(strides="rows", extra_rows=4)),
        ):
            yield f"{spec.name}, {what}", partial(_said_otherwise, subject, spec, other)
        yield f"{spec.name}, max_seqlen", partial(_said_otherwise, subject, spec, spec, _with_longest)


def _said_otherwise(subject: Subject, spec: CaseSpec, other: CaseSpec, change: Change | None = None) -> float | None:
    if other.extra_rows:  # more token rows are drawn: take the plain call's values from the strided one
        plain = Trial(_plain(make_inputs(other, device=subject.device).kwargs, other.tokens)).run(subject)
        return same_case(subject, "M12", run(subject, other), plain, other)
    return same_case(subject, "M12", run(subject, other, change), run(subject, spec), spec)


def _plain(kwargs: Kwargs, tokens: int) -> Kwargs:
    """The same values, contiguous, without the rows to spare."""
    changed = {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in kwargs.items()}
    for name in ("q", "k", "v", "a", "b"):
        changed[name] = changed[name][:, :tokens].contiguous()
    return changed


def _with_longest(kwargs: Kwargs) -> Kwargs:
    longest = SequenceLayout.from_cu_seqlens(kwargs["cu_seqlens"]).longest
    return {**kwargs, "max_seqlen": longest + 2}


def _batch(subject: Subject, spec: CaseSpec) -> float | None:
    return same_case(subject, "M12", run(subject, spec.but(varlen=False)), run(subject, spec), spec)


CHECKS = (
    repeatable,
    packed_alone,
    cut,
    permuted,
    padding_and_empty,
    same_call,
)
