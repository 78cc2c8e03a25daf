"""N1 to N8: values against the float64 reference, under the running error bound."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from ....conformance.check import Examination, Tier, Violation, check
from ....conformance.subject import Subject
from ..case import DISTRIBUTIONS, CaseSpec
from ..cases import BASE, DECODE, FLOAT32, SCENARIOS
from ..dtypes import dtype_of
from ..judge import LIMITS, rounded
from .compare import Recipe, accurate, exact, judged, same, truth
from .kwargs import Kwargs
from .trial import Trial, bits

__all__ = ["CHECKS"]


def _all_accurate(subject: Subject, specs: list[CaseSpec]) -> Iterator[Examination]:
    for spec in specs:
        yield spec.name, partial(accurate, subject, Recipe(spec))


@check("N1", "float32 values within the bound, every distribution")
def float32_values(subject: Subject) -> Iterator[Examination]:
    kinds = [FLOAT32.but(name=d, distribution=d) for d in DISTRIBUTIONS]
    kinds += [FLOAT32.but(name=f"{d}, kda", distribution=d, is_kda=True) for d in DISTRIBUTIONS if d != "tiny_keys"]
    kinds += [FLOAT32.but(name="vk", state_layout="vk"), FLOAT32.but(name="K = V", v=64), DECODE]
    yield from _all_accurate(subject, kinds)


@check("N2", "bfloat16 and float16 values within the bound and half an ulp")
def low_precision_values(subject: Subject) -> Iterator[Examination]:
    kinds = []
    for dtype in ("bfloat16", "float16"):
        for d in ("typical", "long_memory", "extreme", "tiny_keys", "large_values"):
            kinds.append(BASE.but(name=f"{dtype}, {d}", distribution=d, io_dtype=dtype, gate_dtype=dtype))
        kinds.append(BASE.but(name=f"{dtype} pool", io_dtype=dtype, state_dtype=dtype))
    kinds += [BASE.but(name="bfloat16, kda", is_kda=True), SCENARIOS["decode"]]
    yield from _all_accurate(subject, kinds)


@check("N3", "99.5 % of outputs are the rounded reference, the rest one ulp away")
def rounding(subject: Subject) -> Iterator[Examination]:
    for dtype in ("bfloat16", "float16"):
        spec = CaseSpec(f"{dtype}, 80 tokens", (60, 19, 1), k=64, v=48, io_dtype=dtype, gate_dtype="float32")
        yield spec.name, partial(_rounded_well, subject, Recipe(spec))


def _rounded_well(subject: Subject, recipe: Recipe) -> float:
    trial = recipe.trial(subject)
    ref = exact(recipe, subject.chunk(trial.call))
    got = trial.run(subject).o.cpu()
    if ref.o_noise is not None:  # operands are rounded: the error is held against what that will typically cause
        return judged(trial.call, trial.out, ref)
    want = rounded(ref.o, got.dtype)
    equal = got == want
    share = float(equal.double().mean())
    limit = LIMITS[recipe.spec.io_dtype].equal_bits
    if share < limit:
        raise Violation(f"{100 * share:.2f} % of outputs equal the rounded reference (limit {100 * limit:g} %)")
    apart = (_ordered(got) - _ordered(want)).abs()
    if bool(((apart > 1) & (ref.o.abs() >= ref.o_bound)).any()):
        raise Violation(f"an output is {int(apart.max())} ulp from the rounded reference")
    return judged(trial.call, trial.out, ref)


def _ordered(t: torch.Tensor) -> torch.Tensor:
    """16-bit floats as integers that count ulps."""
    pattern = bits(t).to(torch.int64)
    return torch.where(pattern < 0, -(pattern & 0x7FFF), pattern)


@check("N4", "the error does not grow with the length")
def lengths(subject: Subject) -> Iterator[Examination]:
    base = FLOAT32.but(distribution="long_memory", h=1, hv=2, v=24, padded=())
    for tokens in (1, 2, 15, 16, 17, 63, 64, 65, 127, 1025):
        yield f"T = {tokens}", partial(accurate, subject, Recipe(base.but(name="length", lengths=(tokens,))))
    kda = base.but(name="length", lengths=(129,), is_kda=True)
    yield "T = 129, kda", partial(accurate, subject, Recipe(kda))
    worst = base.but(name="length", lengths=(200,), distribution="equal_keys", neg_eigval=True)
    yield "T = 200, equal keys, negative eigenvalues", partial(accurate, subject, Recipe(worst))


@check("N4L", "the error does not grow over 4096 tokens", tier=Tier.FULL)
def long_sequences(subject: Subject) -> Iterator[Examination]:
    for d in ("long_memory", "typical"):
        spec = FLOAT32.but(name=d, lengths=(4096,), distribution=d, h=1, hv=1, v=24, padded=())
        yield f"T = 4096, {d}", partial(accurate, subject, Recipe(spec))


#: x = a + dt_bias around the softplus threshold, and where exp overflows or vanishes in float32.
GATE_X = (-200.0, -88.0, -20.0, -17.0, -1.0, 0.0, 19.99, 20.0, 20.01, 88.0, 200.0)
GATE_A_LOG = (-20.0, -5.0, 0.0, 2.7, 6.0)
GATE_B = (-200.0, -88.0, -17.0, 0.0, 17.0, 88.0, 200.0)


@check("N5", "gates over the whole float32 range are finite and within the bound")
def gate_grid(subject: Subject) -> Iterator[Examination]:
    grid = list(product(GATE_X, GATE_B))
    spec = FLOAT32.but(name="grid", lengths=(2,) * len(grid), padded=(), h=1, hv=len(GATE_A_LOG), k=16, v=8)
    yield "11 x, 5 A_log, 7 b", partial(accurate, subject, Recipe(spec, change=_gate_grid))
    yield (
        "the same in bfloat16",
        partial(accurate, subject, Recipe(spec.but(io_dtype="bfloat16", gate_dtype="bfloat16"), change=_gate_grid)),
    )
    kda = spec.but(is_kda=True)
    yield "kda", partial(accurate, subject, Recipe(kda, change=_gate_grid))
    bounded = kda.but(lower_bound=-5.0)
    yield "kda, bounded", partial(accurate, subject, Recipe(bounded, change=_gate_grid))
    yield (
        "softplus_beta 0.5, threshold 3",
        partial(accurate, subject, Recipe(spec.but(softplus_beta=0.5, softplus_threshold=3.0), change=_gate_grid)),
    )


def _gate_grid(kwargs: Kwargs) -> Kwargs:
    x, b = (torch.tensor(values).repeat_interleave(2) for values in zip(*product(GATE_X, GATE_B), strict=True))
    a = kwargs["a"]
    along = (1, -1, *[1] * (a.dim() - 2))
    return {
        **kwargs,
        "A_log": torch.tensor(GATE_A_LOG).to(kwargs["A_log"]),
        "dt_bias": torch.zeros_like(kwargs["dt_bias"]),
        "a": x.view(along).expand_as(a).to(a, copy=True),
        "b": b.view(1, -1, 1).expand_as(kwargs["b"]).to(kwargs["b"], copy=True),
    }


@check("N6", "degenerate keys: zero, tiny, all equal, near overflow")
def degenerate_keys(subject: Subject) -> Iterator[Examination]:
    spec = FLOAT32.but(name="keys", distribution="long_memory")
    for name, change in (
        ("k = 0", partial(_scaled, k=0.0)),
        ("q = 0", partial(_scaled, q=0.0)),
        ("|k| = 1e-4", partial(_scaled, k=1e-5)),
        ("|k| = 1e-3", partial(_scaled, k=1e-4)),
        ("|k| = 1e16", partial(_scaled, k=1e15)),
        ("|q| = 1e16", partial(_scaled, q=1e15)),
    ):
        yield name, partial(accurate, subject, Recipe(spec, change=change))
    yield "all keys equal", partial(accurate, subject, Recipe(spec.but(distribution="equal_keys")))
    no_norm = spec.but(l2norm=False)
    yield "k = 0, no l2 norm", partial(accurate, subject, Recipe(no_norm, change=partial(_scaled, k=0.0)))
    yield "a zero key takes no value in", partial(_zero_key, subject, spec)


def _scaled(kwargs: Kwargs, **factors: float) -> Kwargs:
    return {**kwargs, **{name: kwargs[name] * factor for name, factor in factors.items()}}


def _zero_key(subject: Subject, spec: CaseSpec) -> float | None:
    """With k = 0 the state only decays: bit for bit the same whatever v is."""
    given = Recipe(spec, change=partial(_scaled, k=0.0)).trial(subject).run(subject)
    without = Recipe(spec, change=partial(_scaled, k=0.0, v=0.0)).trial(subject).run(subject)
    return same(subject, "N6", given, without)


@check("N7", "sixteen decode calls through a low-precision pool")
def decode_through_pool(subject: Subject) -> Iterator[Examination]:
    base = CaseSpec("decode", (1,) * 4, v=40)
    for spec in (
        base.but(state_dtype="bfloat16"),
        base.but(state_dtype="float16", io_dtype="float16", state_layout="vk"),
        base.but(state_dtype="bfloat16", is_kda=True, distribution="long_memory"),
    ):
        name = f"{spec.state_dtype} {spec.state_layout}{', kda' if spec.is_kda else ''}"
        yield name, partial(_decode, subject, spec)


def _decode(subject: Subject, spec: CaseSpec) -> float:
    """Each call is judged from the state the last one stored, so every call's own rounding is what counts."""
    first = Trial.of(spec, 0, subject.device).call
    worst = 0.0
    for step in range(16):
        call = Trial.of(spec, step, subject.device).call.replace(pool=first.pool, read_slots=first.read_slots)
        ref = truth(call, subject.chunk(call))
        out = subject.run(call)
        worst = max(worst, judged(call, out, ref))
    return worst


@check("N8", "overflow: infinities where the rounded reference has them, and nowhere else")
def overflow(subject: Subject) -> Iterator[Examination]:
    half = BASE.but(name="half", io_dtype="float16", gate_dtype="float16", distribution="long_memory")
    yield "outputs beyond float16", partial(_overflowing, subject, Recipe(half, change=_huge_states))
    policy = FLOAT32.but(name="policy")
    for A_log, a in ((100.0, -200.0), (88.0, -200.0), (100.0, 5.0), (60.0, -70.0)):
        change = partial(_gates, A_log=A_log, a=a)
        yield f"A_log = {A_log:g}, a = {a:g}", partial(accurate, subject, Recipe(policy, change=change))


def _huge_states(kwargs: Kwargs) -> Kwargs:
    pool = kwargs["initial_state_source"]
    pool.mul_(1e6)
    return kwargs


def _gates(kwargs: Kwargs, A_log: float, a: float) -> Kwargs:
    changed = {"A_log": A_log, "a": a, "dt_bias": 0.0}
    return {**kwargs, **{name: torch.full_like(kwargs[name], value) for name, value in changed.items()}}


def _overflowing(subject: Subject, recipe: Recipe) -> float:
    want = rounded(exact(recipe).o, dtype_of(recipe.spec.io_dtype))
    share = float(torch.isinf(want).double().mean())
    assert 0.1 < share < 0.9, f"the case must overflow in part, {share:.0%} does"
    trial = recipe.trial(subject)
    got = trial.run(subject).o.cpu()
    for what, mask in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        wrong = int((mask(got) != mask(want)).sum())
        if wrong:
            raise Violation(f"{wrong} outputs are {what} in one and not in the other of result and rounded reference")
    return judged(trial.call, trial.out, exact(recipe, subject.chunk(trial.call)))


CHECKS = (
    float32_values,
    low_precision_values,
    rounding,
    lengths,
    long_sequences,
    gate_grid,
    degenerate_keys,
    decode_through_pool,
    overflow,
)
