"""C6 to C14 and C16: what the contract says of layouts, outputs, scalars, shapes, dtypes and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ....conformance.check import Declined, Examination, Tier, Violation, check
from ....conformance.subject import Subject
from ....decision import Rejected
from ..case import CaseSpec
from ..cases import BASE, CASES, FLOAT32
from ..validate import canonical_call
from .compare import Recipe, accurate, exact, exact_for, near, same
from .gradients import gradients_agree
from .kwargs import Kwargs, fresh
from .slots import accurate_and_untouched
from .trial import Trial, guarded
from .verification import CHAIN

__all__ = ["CHECKS"]


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
    return same(subject, "C6", vk, kv, partial(exact_for, subject, Recipe(spec)))


@check("C7", "zero-length sequences at the front, inside, at the end, everywhere")
def empty_sequences(subject: Subject) -> Iterator[Examination]:
    for lengths in ((0, 3, 2), (3, 0, 0, 2), (3, 2, 0), (0, 0, 4, 0, 0), (0,), (0, 0)):
        for base in (FLOAT32, BASE.but(is_kda=True)):
            spec = base.but(name="empty", lengths=lengths, padded=())
            kind = "kda" if base.is_kda else "gdn"
            yield f"{kind} {lengths}", partial(accurate_and_untouched, subject, Recipe(spec))


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
    return same(subject, "C8", got, want, partial(exact_for, subject, Recipe(spec)))


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
            yield spec.name, partial(accurate_and_untouched, subject, Recipe(spec))


@check("C12", "mixed dtypes of inputs, gates, pool and buffer")
def dtypes(subject: Subject) -> Iterator[Examination]:
    for spec in CASES["extended"]:
        if " in, " in spec.name or spec.name.startswith(("bfloat16 vectors", "float32 gates")):
            yield spec.name, partial(accurate, subject, Recipe(spec))


@check("C13", "more sequence-heads than 65535", tier=Tier.FULL)
def many_sequences(subject: Subject) -> Iterator[Examination]:
    spec = BASE.but(name="wide", lengths=(1,) * 1030, padded=(7, 1029), h=16, hv=64, k=4, v=5)
    yield "N = 1030, HV = 64", partial(accurate_and_untouched, subject, Recipe(spec))


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


@check("C16", "every case of the extended list within the bound", tier=Tier.FULL)
def extended(subject: Subject) -> Iterator[Examination]:
    for spec in CASES["extended"]:
        yield spec.name, partial(accurate_and_untouched, subject, Recipe(spec))


CHECKS = (
    state_layouts,
    empty_sequences,
    given_output,
    equal_gates,
    scalars,
    shapes,
    dtypes,
    many_sequences,
    gradients,
    extended,
)
