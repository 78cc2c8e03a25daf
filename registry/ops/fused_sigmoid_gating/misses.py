"""Calls that ran without a tuned choice, as a workload that a warm-up can tune.

A problem holds buckets, a workload real lengths; so a layout is made up that falls into the same buckets and class.
Whether warming it up would help the call that was missed is not guessed: the case's tuning key must be the problem's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ....cache.compare import differences
from ....errors import ArgumentValueError
from ...accuracy import DEFAULT
from ...varlen.classes import LengthClass
from ...varlen.profile import VarlenProfile
from .catalogue import Dtypes, Gate, Shard, catalogue
from .concrete import concrete
from .describe import describe
from .lengths import LengthLayout
from .problem import Problem
from .workload_case import Case, Phase, Policy, Tier, Verify, case_name

__all__ = ["Recorded", "cases_of", "lengths_of", "models_like"]

_VERIFY = {"none": Verify.NONE, "chain": Verify.CHAIN, "tree": Verify.TREE}


@dataclass(frozen=True, slots=True)
class Recorded:
    """Missed calls of one layer's shape.

    Attributes:
        shard: the layer, as far as the calls tell. models: (name, tensor-parallel degree) that have such layers.
        cases: what to warm up, most often missed first.
        left_out: calls that no warm-up would help, with the reason.
    """

    shard: Shard
    models: tuple[tuple[str, int], ...]
    cases: tuple[Case, ...]
    left_out: tuple[tuple[Problem, str], ...]


def cases_of(misses: Mapping[Problem, int]) -> tuple[Recorded, ...]:
    """``misses`` (how often each problem was missed) by the shape of their layers, most often missed first."""
    order = sorted(misses, key=lambda problem: -misses[problem])  # stable
    shapes: dict[Shard, list[Problem]] = {}
    for problem in order:
        shapes.setdefault(_shard(problem), []).append(problem)
    return tuple(_recorded(shard, problems) for shard, problems in shapes.items())


def _recorded(shard: Shard, problems: list[Problem]) -> Recorded:
    cases: dict[str, Case] = {}
    left_out = []
    for problem in problems:
        found = _case(shard, problem)
        if isinstance(found, Case):
            cases.setdefault(found.name, found)
        else:
            left_out.append((problem, found))
    return Recorded(shard, models_like(shard), tuple(cases.values()), tuple(left_out))


def _case(shard: Shard, problem: Problem) -> Case | str:
    """The case whose tuning answers ``problem``, or why there is none."""
    if problem.profile.length_class is LengthClass.UNKNOWN or problem.profile.longest is None:
        return "the host does not know its lengths: pass a SequenceLayout, or max_seqlen="
    lengths = lengths_of(problem.profile)
    if lengths is None:
        return f"no layout falls into {problem.profile.label}"
    verify = _VERIFY[problem.intermediates]
    layout = LengthLayout.of_lengths(lengths)
    phase = Phase.VERIFY if verify is not Verify.NONE else _phase(lengths)
    policy = Policy(problem.mode)
    name = f"{case_name(phase, layout, verify, problem.state_dtype)} {policy.value}"
    accuracy = None if problem.accuracy == DEFAULT else problem.accuracy
    if accuracy is not None:
        name += f" {accuracy}"
    steps = max(lengths) if verify is not Verify.NONE else 0
    layouts = (problem.state_dtype, verify, steps, policy, problem.state_layout)
    try:
        case = Case(name, phase, layout, *layouts, tier=Tier.CORE, accuracy=accuracy)
    except ArgumentValueError as error:  # a float64 pool, say: the op takes it, no workload has it
        return str(error)
    tuned = describe(concrete(shard, case), problem.device, problem.arch, problem.mode, problem.accuracy).tuning_key()
    unlike = differences(tuned, problem.tuning_key())
    if unlike:
        return "a warm-up tunes " + ", ".join(f"{n}={there} (here {here})" for n, (there, here) in unlike.items())
    return case


def _phase(lengths: tuple[int, ...]) -> Phase:
    if max(lengths, default=0) <= 1:
        return Phase.DECODE
    return Phase.MIXED if 1 in lengths else Phase.PREFILL


def lengths_of(profile: VarlenProfile) -> tuple[int, ...] | None:
    """Lengths that fall into ``profile``, as full as its buckets allow; None if none were found."""
    if profile.longest is None:
        return None
    for n in _within(profile.n):
        for tokens in _within(profile.tokens):
            for longest in _within(profile.longest):
                lengths = _spread(n, tokens, longest)
                if lengths and VarlenProfile.of(n, tokens, max(lengths)) == profile:
                    return lengths
    return None


def _within(bucket: int) -> Iterator[int]:
    """Counts that share ``bucket``, from its top to its bottom."""
    yield from dict.fromkeys((bucket, bucket * 7 // 8, bucket * 3 // 4, bucket * 5 // 8, bucket // 2 + 1))


def _spread(n: int, tokens: int, longest: int) -> tuple[int, ...]:
    """``tokens`` over ``n`` sequences, one of them ``longest``, the others as equal as they come; () if impossible."""
    if n == 0 or not longest <= tokens <= n * longest:
        return (0,) * n if tokens == 0 else ()
    base, extra = divmod(tokens - longest, n - 1) if n > 1 else (0, tokens - longest)
    if extra and n == 1:
        return ()
    return (*((base + 1,) * extra), *((base,) * (n - 1 - extra)), longest)


def _shard(problem: Problem) -> Shard:
    """The layer that ``problem`` is a call of; what its calls do not tell is as in most models."""
    dtypes = Dtypes(
        q=problem.io_dtype,
        k=problem.io_dtype,
        v=problem.io_dtype,
        a=problem.a_dtype,
        b=problem.a_dtype,
        A_log=problem.A_log_dtype,
        dt_bias=problem.dt_bias_dtype,
        state=problem.state_dtype or "float32",
    )
    return Shard(
        model="",
        tp=1,
        H=problem.h,
        HV=problem.hv,
        K=problem.k,
        V=problem.v,
        gate=Gate.KDA if problem.is_kda else Gate.GDN,
        lower_bound=-5.0 if problem.lower_bound else None,  # its value is no part of a key
        allow_neg_eigval=problem.neg_eigval,
        qk_l2norm=problem.l2norm,
        linear_layers=None,
        dtypes=dtypes,
        state_layout=problem.state_layout,
    )


def models_like(shard: Shard) -> tuple[tuple[str, int], ...]:
    """Models of the catalogue, with the tensor-parallel degree, whose layers are called as ``shard``'s are."""

    def shape(one: Shard) -> tuple[object, ...]:
        gate = (one.gate, one.lower_bound is None, one.allow_neg_eigval, one.qk_l2norm)
        return (one.H, one.HV, one.K, one.V, *gate, one.dtypes.q)

    found = (
        (m.name, tp) for m in catalogue().values() for tp in m.tensor_parallel if shape(m.shard(tp)) == shape(shard)
    )
    return tuple(found)
