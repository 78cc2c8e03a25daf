"""M1 to M12: relations between calls that hold bit for bit, whatever the values are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch

from ....conformance.check import Examination, Violation, check
from ....conformance.subject import Subject
from ....varlen.layout import SequenceLayout
from ..case import CaseSpec
from ..cases import BASE, DECODE, FLOAT32, SCENARIOS
from ..inputs import make_inputs
from .compare import Recipe, accurate, exact, same
from .kwargs import Kwargs, Span, fresh, permute_values, select_spans, to_head
from .trial import Results, Trial, bits

__all__ = ["CHECKS", "RELATION_CASES", "packed_equals_alone"]

#: Calls the relations are tried on: several dtypes, both layouts, both kinds of gate, prompts and decode.
RELATION_CASES: tuple[CaseSpec, ...] = (
    FLOAT32.but(name="float32"),
    BASE.but(name="bfloat16, kda, vk", is_kda=True, state_layout="vk"),
    DECODE,
    BASE.but(name="float16 in, bfloat16 pool", io_dtype="float16", gate_dtype="float32", state_dtype="bfloat16"),
)

Change = Callable[[Kwargs], Kwargs]


def _run(subject: Subject, spec: CaseSpec, change: Change | None = None) -> Results:
    return Recipe(spec, change=change).trial(subject).run(subject)


def _same(subject: Subject, check_id: str, got: Results, want: Results, spec: CaseSpec) -> float | None:
    """``got`` and ``want`` both describe the case itself."""
    recipe = Recipe(spec)
    return same(subject, check_id, got, want, lambda: exact(recipe, subject.chunk(recipe.trial(subject).call)))


@check("M1", "three runs give the same bits, other work beside them or not", promise="repeatable", relaxable=True)
def repeatable(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield spec.name, partial(_repeats, subject, spec)
    yield "beside other work", partial(_repeats_beside_work, subject, FLOAT32)


def _repeats(subject: Subject, spec: CaseSpec, runs: int = 3) -> float | None:
    first = _run(subject, spec)
    worst = None
    for _ in range(runs - 1):
        worst = _largest(worst, _same(subject, "M1", _run(subject, spec), first, spec))
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


def _largest(x: float | None, y: float | None) -> float | None:
    return y if x is None else x if y is None else max(x, y)


@check("M2", "packed sequences = each sequence alone", promise="batch_invariant", relaxable=True)
def packed_alone(subject: Subject) -> Iterator[Examination]:
    for spec in (*RELATION_CASES, SCENARIOS["packed 5,7,6"], SCENARIOS["one long, many short"]):
        yield spec.name, partial(packed_equals_alone, subject, spec)


def packed_equals_alone(subject: Subject, spec: CaseSpec) -> float | None:
    """Run the packed call, then each of its sequences in a call of its own from the same states."""
    together = _run(subject, spec)
    alone = [_run(subject, spec, partial(_spans, spec=spec, spans=((n, 0, spec.lengths[n]),))) for n in range(spec.n)]
    return _same(subject, "M2", _joined(alone), together, spec)


def _spans(kwargs: Kwargs, spec: CaseSpec, spans: tuple[Span, ...]) -> Kwargs:
    return select_spans(kwargs, spec, spans)


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
    whole = _run(subject, spec)
    kwargs = fresh(spec, device=subject.device)
    edges = (0, *at, spec.lengths[0])
    outputs, last = [], None
    for first, end in pairwise(edges):
        last = Trial(select_spans(kwargs, spec, [(0, first, end)])).run(subject)  # one pool for all of them
        outputs.append(last.o)
    assert last is not None
    return _same(subject, "M3", Results(torch.cat(outputs), last.states, last.steps), whole, spec)


@check("M4", "permuting sequences permutes outputs and states", promise="batch_invariant", relaxable=True)
def permuted(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        for order in ((4, 3, 2, 1, 0), (2, 4, 0, 3, 1)):
            yield f"{spec.name}, {order}", partial(_permuted, subject, spec, order)


def _permuted(subject: Subject, spec: CaseSpec, order: tuple[int, ...]) -> float | None:
    spans = tuple((n, 0, spec.lengths[n]) for n in order)
    got = _run(subject, spec, partial(_spans, spec=spec, spans=spans))
    chunks = dict(zip(order, torch.split(got.o, [spec.lengths[n] for n in order]), strict=True))
    states = dict(zip(order, got.states, strict=True))
    back = Results(
        torch.cat([chunks[n] for n in range(spec.n)]), tuple(states[n] for n in range(spec.n)), (None,) * spec.n
    )
    return _same(subject, "M4", back, _run(subject, spec), spec)


@check("M5", "one value head alone = that head of the whole", relaxable=True)
def one_head(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        for head in (0, 1, spec.hv - 1):
            yield f"{spec.name}, head {head}", partial(_one_head, subject, spec, head)
    odd = FLOAT32.but(name="H = 3, HV = 9", h=3, hv=9, k=24, v=16)
    yield f"{odd.name}, head 5", partial(_one_head, subject, odd, 5)


def _one_head(subject: Subject, spec: CaseSpec, head: int) -> float | None:
    part = _run(subject, spec, partial(to_head, head=head, spec=spec))
    whole = _run(subject, spec)
    # Put the head's results into the whole's, so that the reference of the whole applies.
    o = whole.o.clone()
    o[:, head : head + 1] = part.o
    states: list[torch.Tensor | None] = []
    for mine, all_heads in zip(part.states, whole.states, strict=True):
        patched = None if all_heads is None else all_heads.clone()
        if mine is not None and patched is not None:
            patched[head : head + 1] = mine
        states.append(patched)
    return _same(subject, "M5", Results(o, tuple(states), whole.steps), whole, spec)


@check("M6", "permuting value columns permutes outputs and states", relaxable=True)
def permuted_columns(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield spec.name, partial(_permuted_columns, subject, spec)


def _permuted_columns(subject: Subject, spec: CaseSpec) -> float | None:
    order = torch.randperm(spec.v, generator=torch.Generator().manual_seed(6))
    back = torch.argsort(order)
    got = _run(subject, spec, partial(permute_values, order=order))
    states = tuple(None if s is None else s[..., back] for s in got.states)
    return _same(subject, "M6", Results(got.o[..., back], states, got.steps), _run(subject, spec), spec)


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
    got = _run(subject, spec.but(scale=base * factor))
    want = _run(subject, spec.but(scale=base))
    return _same(subject, "M7", Results(got.o / factor, got.states, got.steps), want, spec)


@check("M8", "sign flips: of q; of values and states; of keys and states", relaxable=True)
def signs(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield f"{spec.name}, q", partial(_flipped_query, subject, spec)
        yield f"{spec.name}, v and state", partial(_transformed, subject, "M8", spec, -1.0, -1.0, 1.0)
        yield f"{spec.name}, k and state", partial(_flipped_keys, subject, spec)


def _flipped_query(subject: Subject, spec: CaseSpec) -> float | None:
    got = _run(subject, spec, partial(_times, q=-1.0))
    return _same(subject, "M8", Results(-got.o, got.states, got.steps), _run(subject, spec), spec)


def _flipped_keys(subject: Subject, spec: CaseSpec) -> float | None:
    """k -> -k, S -> -S, v as it is: the prediction S^T k stays, the update k u^T flips, and o with it."""
    got = _run(subject, spec, partial(_times, k=-1.0, initial_state_source=-1.0))
    states = tuple(None if s is None else -s for s in got.states)
    return _same(subject, "M8", Results(-got.o, states, got.steps), _run(subject, spec), spec)


def _times(kwargs: Kwargs, **factors: float) -> Kwargs:
    return {**kwargs, **{name: kwargs[name] * factor for name, factor in factors.items()}}


def _transformed(
    subject: Subject, check_id: str, spec: CaseSpec, values: float, state: float, query: float
) -> float | None:
    got = _run(subject, spec, partial(_times, v=values, initial_state_source=state, q=query))
    states = tuple(None if s is None else s / state for s in got.states)
    return _same(subject, check_id, Results(got.o / (state * query), states, got.steps), _run(subject, spec), spec)


def _gates(kwargs: Kwargs, **values: float) -> Kwargs:
    return {**kwargs, **{name: torch.full_like(kwargs[name], value) for name, value in values.items()}}


@check("M9", "an identity gate leaves the pool as it is")
def identity_gate(subject: Subject) -> Iterator[Examination]:
    for spec in RELATION_CASES:
        yield spec.name, partial(_identity, subject, spec)
    yield "kda, bounded", partial(_identity, subject, FLOAT32.but(name="bounded", is_kda=True, lower_bound=-5.0))


def _identity(subject: Subject, spec: CaseSpec) -> float | None:
    """a = b = -200: the decay is 1 and beta 0, so the pool keeps its bits and o = scale * S0^T q."""
    change = partial(_gates, a=-200.0, b=-200.0, dt_bias=0.0)
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
    change = partial(_gates, a=200.0, A_log=5.0, dt_bias=0.0)
    given = _run(subject, spec, change)
    other = _run(subject, spec, lambda kwargs: change(_times(kwargs, initial_state_source=-3.0)))
    for n, length in enumerate(spec.lengths):
        if length == 0:  # its state is not forgotten, only kept
            given, other = _without_state(given, n), _without_state(other, n)
    return same(subject, "M10", other, given)


def _without_state(results: Results, n: int) -> Results:
    states = tuple(None if i == n else s for i, s in enumerate(results.states))
    return Results(results.o, states, results.steps)


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

    want = _run(subject, zeroed, zero_slot)
    return _same(subject, "M11", got, _without_state(want, n), spec)


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
        return _same(subject, "M12", _run(subject, other), plain, other)
    return _same(subject, "M12", _run(subject, other, change), _run(subject, spec), spec)


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
    return _same(subject, "M12", _run(subject, spec.but(varlen=False)), _run(subject, spec), spec)


CHECKS = (
    repeatable,
    packed_alone,
    cut,
    permuted,
    one_head,
    permuted_columns,
    powers_of_two,
    signs,
    identity_gate,
    erasing_gate,
    padding_and_empty,
    same_call,
)
