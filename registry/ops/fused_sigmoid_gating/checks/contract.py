"""C1 to C16: what the contract says of verification, slots, layouts, shapes, dtypes, scalars and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ....conformance.check import Declined, Examination, Tier, Violation, check
from ....conformance.subject import Subject
from ....decision import Rejected
from ..case import CaseSpec
from ..cases import BASE, CASES, FLOAT32
from ..inputs import make_inputs
from ..reference import Reference
from ..validate import canonical_call
from .compare import Recipe, accurate, exact, near, same
from .gradients import gradients_agree
from .kwargs import Kwargs, fresh, offsets_of, select_spans
from .trial import Results, Trial, guarded

__all__ = ["CHECKS", "TREE"]

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
            partial(_exact, subject, recipe),
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


def _exact(subject: Subject, recipe: Recipe) -> Reference:
    return exact(recipe, subject.chunk(recipe.trial(subject).call))


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
    ref = _exact(subject, Recipe(spec))
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
    return same(subject, "C3", got, stored_nothing, partial(_exact, subject, Recipe(spec)))


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
    return same(subject, "C4", got, want, partial(_exact, subject, recipe))


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


@check("C6", "both state layouts give the same bits", relaxable=True)
def state_layouts(subject: Subject) -> Iterator[Examination]:
    for spec in (
        FLOAT32,
        FLOAT32.but(name="K = V", v=64),
        BASE.but(name="kda, bfloat16 pool", is_kda=True, state_dtype="bfloat16"),
        CHAIN,
    ):
        yield spec.name, partial(_layouts, subject, spec)


def _layouts(subject: Subject, spec: CaseSpec) -> float | None:
    kv = Trial.of(spec, device=subject.device).run(subject)
    kwargs = fresh(spec, device=subject.device)
    for name in ("initial_state_source", "intermediate_states_buffer"):
        if name in kwargs:
            kwargs[name] = kwargs[name].transpose(-1, -2).contiguous()
    vk = Trial({**kwargs, "state_layout": "vk"}).run(subject)
    return same(subject, "C6", vk, kv, partial(_exact, subject, Recipe(spec)))


@check("C7", "zero-length sequences at the front, inside, at the end, everywhere")
def empty_sequences(subject: Subject) -> Iterator[Examination]:
    for lengths in ((0, 3, 2), (3, 0, 0, 2), (3, 2, 0), (0, 0, 4, 0, 0), (0,), (0, 0)):
        for base in (FLOAT32, BASE.but(is_kda=True)):
            spec = base.but(name="empty", lengths=lengths, padded=())
            kind = "kda" if base.is_kda else "gdn"
            yield f"{kind} {lengths}", partial(_accurate_and_untouched, subject, Recipe(spec))


def _accurate_and_untouched(subject: Subject, recipe: Recipe) -> float:
    _untouched(subject, recipe)
    return accurate(subject, recipe)


@check("C8", "out= is written in place, whatever its strides", relaxable=True)
def given_output(subject: Subject) -> Iterator[Examination]:
    for spec in (FLOAT32.but(extra_rows=2), BASE, BASE.but(varlen=False, lengths=(3, 3), padded=())):
        shape = (2, 3, spec.hv, spec.v) if not spec.varlen else (1, spec.tokens + spec.extra_rows, spec.hv, spec.v)
        b, t, hv, v = shape
        kind = f"{spec.io_dtype} {'packed' if spec.varlen else 'batch'}"
        row = hv * v
        for what, stride in (
            ("contiguous", (t * row, row, v, 1)),
            ("rows apart", (t * (row + 8), row + 8, v, 1)),
            ("heads apart", (t * hv * (v + 3), hv * (v + 3), v + 3, 1)),
            ("heads outside", (t * v, v, b * t * v, 1)),
            ("every other value", (2 * t * row, 2 * row, 2 * v, 2)),
        ):
            yield f"{kind}, {what}", partial(_given, subject, spec, shape, stride)


def _given(subject: Subject, spec: CaseSpec, shape: tuple[int, ...], stride: tuple[int, ...]) -> float | None:
    kwargs = fresh(spec, device=subject.device)
    out = guarded(shape, kwargs["q"].dtype, subject.device, stride)
    trial = Trial({**kwargs, "out": out})
    got = trial.run(subject)
    trial.check_output()
    want = Trial.of(spec, device=subject.device).run(subject)
    return same(subject, "C8", got, want, partial(_exact, subject, Recipe(spec)))


@check("C9", "KDA with equal gates over K = GDN")
def equal_gates(subject: Subject) -> Iterator[Examination]:
    for spec in (FLOAT32, FLOAT32.but(name="extreme", distribution="extreme", neg_eigval=True), BASE):
        yield spec.name, partial(_equal_gates, subject, spec)


def _equal_gates(subject: Subject, spec: CaseSpec) -> float:
    gdn = Trial.of(spec, device=subject.device).run(subject)
    kda = Recipe(spec, change=partial(_as_kda, k=spec.k)).trial(subject).run(subject)
    ref = exact(Recipe(spec), subject.chunk(Trial.of(spec, device=subject.device).call))
    return near(kda, gdn, ref, 2.0)


def _as_kda(kwargs: Kwargs, k: int) -> Kwargs:
    wide = {name: kwargs[name][..., None].expand(*kwargs[name].shape, k).contiguous() for name in ("a", "dt_bias")}
    return {**kwargs, **wide, "is_kda": True}


@check("C10", "scalars and flags: scale, softplus, lower bound, negative eigenvalues, no L2 norm")
def scalars(subject: Subject) -> Iterator[Examination]:
    kda = FLOAT32.but(is_kda=True)
    for name, spec in (
        ("scale 1", FLOAT32.but(scale=1.0)),
        ("scale 0.3, no l2 norm", FLOAT32.but(scale=0.3, l2norm=False)),
        ("softplus_beta 0.5", FLOAT32.but(softplus_beta=0.5)),
        (
            "softplus_beta 2, threshold 3",
            FLOAT32.but(softplus_beta=2.0, softplus_threshold=3.0, distribution="extreme"),
        ),
        ("negative eigenvalues", FLOAT32.but(neg_eigval=True)),
        ("negative eigenvalues, no l2 norm, kda", kda.but(neg_eigval=True, l2norm=False)),
        ("lower bound -5", kda.but(lower_bound=-5.0)),
        ("lower bound -0.1, extreme", kda.but(lower_bound=-0.1, distribution="extreme")),
        ("lower bound -5, bfloat16", BASE.but(is_kda=True, lower_bound=-5.0)),
        ("no state", FLOAT32.but(state_dtype=None, padded=())),
    ):
        yield name, partial(accurate, subject, Recipe(spec.but(name=name)))


@check("C11", "head counts and head sizes that are no powers of two")
def shapes(subject: Subject) -> Iterator[Examination]:
    for spec in CASES["extended"]:
        if spec.name.startswith(("H=", "K=")):
            yield spec.name, partial(_accurate_and_untouched, subject, Recipe(spec))


@check("C12", "mixed dtypes of inputs, gates, pool and buffer")
def dtypes(subject: Subject) -> Iterator[Examination]:
    for spec in CASES["extended"]:
        if " in, " in spec.name or spec.name.startswith(("bfloat16 vectors", "float32 gates")):
            yield spec.name, partial(accurate, subject, Recipe(spec))


@check("C13", "more sequence-heads than 65535", tier=Tier.FULL)
def many_sequences(subject: Subject) -> Iterator[Examination]:
    spec = BASE.but(name="wide", lengths=(1,) * 1030, padded=(7, 1029), h=16, hv=64, k=4, v=5)
    yield "N = 1030, HV = 64", partial(_accurate_and_untouched, subject, Recipe(spec))


@check("C14", "gradients are those of the recurrence, or the predicate declines them")
def gradients(subject: Subject) -> Iterator[Examination]:
    differentiable = "differentiable" in subject.backend.tags
    small = FLOAT32.but(name="small", lengths=(5, 0, 3), padded=(2,), h=1, hv=2, k=6, v=4)
    for spec in (small, small.but(name="kda", is_kda=True), small.but(name="bounded", is_kda=True, lower_bound=-2.0)):
        if differentiable:
            yield f"{spec.name}, float64", partial(gradients_agree, subject, _in_float64(spec))
    yield "predicate", partial(_predicate_knows_grad, subject, small, differentiable)


def _in_float64(spec: CaseSpec) -> CaseSpec:
    every = dict.fromkeys(("io_dtype", "gate_dtype", "state_dtype", "A_log_dtype", "dt_bias_dtype"), "float64")
    return spec.but(update="disabled", **every)


def _predicate_knows_grad(subject: Subject, spec: CaseSpec, differentiable: bool) -> None:
    kwargs = fresh(spec, device=subject.device)
    kwargs["v"].requires_grad_()
    problem = canonical_call(**kwargs).problem()
    verdict = subject.verdict(problem)
    if differentiable and isinstance(verdict, Rejected):
        raise Declined(verdict)
    if not differentiable and not isinstance(verdict, Rejected):
        raise Violation("accepts inputs that require grad without the tag 'differentiable'")


@check("C15", "slots in any order, far apart, the first and the last")
def slot_orders(subject: Subject) -> Iterator[Examination]:
    spec = FLOAT32.but(name="slots", lengths=(3, 2, 4), padded=(), extra_slots=6)
    for slots in ((0, 1, 2), (8, 0, 4), (2, 1, 0), (8, 7, 6), (-1, 8, -1), (-1, -1, -1), (-7, 0, -2)):
        change = partial(_on_slots, slots=slots)
        yield str(slots), partial(_accurate_and_untouched, subject, Recipe(spec, change=change))


def _on_slots(kwargs: Kwargs, slots: tuple[int, ...]) -> Kwargs:
    given = kwargs["initial_state_indices"]
    return {**kwargs, "initial_state_indices": torch.tensor(slots, dtype=given.dtype, device=given.device)}


@check("C16", "every case of the extended list within the bound", tier=Tier.FULL)
def extended(subject: Subject) -> Iterator[Examination]:
    for spec in CASES["extended"]:
        yield spec.name, partial(_accurate_and_untouched, subject, Recipe(spec))


CHECKS = (
    chain,
    tree,
    disabled_update,
    separate_slots,
    zero_start,
    state_layouts,
    empty_sequences,
    given_output,
    equal_gates,
    scalars,
    shapes,
    dtypes,
    many_sequences,
    gradients,
    slot_orders,
    extended,
)
