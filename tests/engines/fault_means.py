"""Whether a planted fault shows, by each of the means of ``planted_faults``. Imported after an engine is loaded."""

from __future__ import annotations

import torch

from isokern.registry.conformance.check import BackendRaised, Violation
from isokern.registry.conformance.subject import Subject
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.cases import FLOAT32
from isokern.registry.ops.fused_sigmoid_gating.checks.kwargs import fresh, with_slots
from isokern.registry.ops.fused_sigmoid_gating.checks.trial import Trial, bits
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

#: The configs tried, in the backend's own order: what one tile hides another shows.
CONFIGS = 6


#: A relative error that float32 sums of a few hundred terms stay below, where none is much larger than the sum.
PRECISE = 1e-6

#: More tokens than a window holds, an empty sequence, one without a slot, K and V that fill no tile.
BASE = CaseSpec("base", (11, 0, 3), h=1, hv=2, k=20, v=24, padded=(2,), state_layout="vk")
#: Sums that only grow show what is cut off them.
EQUAL_KEYS = FLOAT32.but(h=1, hv=1, padded=(), distribution="equal_keys")
CASES = {
    "base": BASE,
    "kv": BASE.but(state_layout="kv"),
    "bfloat16 pool": BASE.but(state_dtype="bfloat16"),
    "kda": BASE.but(is_kda=True),
    "decode": BASE.but(lengths=(1, 0, 1)),
    "tree": BASE.but(lengths=(6, 0, 3), verify="tree"),
    "strided": BASE.but(strides="any"),
    "far": BASE.but(lengths=(3, 0, 0), padded=(1, 2)),
    "separate slots": BASE.but(update="separate"),
    "chunks": BASE.but(lengths=(3, 70, 0, 130), k=24, padded=(3,)),
    "kda chunks": BASE.but(lengths=(50, 0, 3), k=40, is_kda=True, distribution="long_memory", padded=()),
    "ring": BASE.but(lengths=(330,), k=24, padded=()),
    "memory": BASE.but(lengths=(70,), k=24, padded=(), distribution="long_memory"),
    "segments": BASE.but(lengths=(200, 0, 70), k=24, padded=(), distribution="long_memory"),
    "extreme": EQUAL_KEYS.but(lengths=(70,), h=2, hv=2, k=16, v=8, distribution="extreme"),
    "five heads": BASE.but(lengths=(3,), hv=5, padded=()),
    "wide": BASE.but(lengths=(3, 40), k=72, padded=()),
    "float32": EQUAL_KEYS.but(lengths=(11, 3), k=16, v=8, distribution="typical"),
    "equal keys": EQUAL_KEYS.but(lengths=(200,), hv=2, v=24, k=64, neg_eigval=True),
    "long": EQUAL_KEYS.but(lengths=(1000,), k=16, v=8),
}


def subjects(backend, engine, spec):
    """The backend under several of its configs."""
    offered = backend.configs(Trial.of(spec).call.problem())
    return [Subject(backend, config, engine=engine) for config in list(offered)[:CONFIGS]]


def shown_by(means, subject, spec, truth):
    """Whether one config shows the fault by these means. ``BackendRaised`` comes from the engine."""
    if means == "far":
        return beyond(subject, spec)
    trial = Trial.of(spec)
    if means == "watch":
        try:
            with subject.engine.watch_addresses(trial.call.tensors()):
                trial.run(subject)
        except (Violation, BackendRaised) as error:
            return isinstance(error, Violation) or isinstance(error.__cause__, Violation)
        return False
    results = trial.run(subject)
    if means in ("values", "misuse"):
        try:
            trial.check_untouched()
        except Violation:
            return True
        return not judge(trial.call, trial.out, truth).ok
    if means == "precise":
        judged = judge(trial.call, trial.out, truth)
        return max(judged.rel_o, judged.rel_state) > PRECISE
    if means == "error":
        return False
    for _, active in subject.engine.schedules():
        with active():
            other = Trial.of(spec).run(subject)
        if not torch.equal(bits(other.o), bits(results.o)):
            return True
    return False


def beyond(subject, spec):
    """Whether slots 2**30 elements apart make a difference, or lead out of the pool: as offsets of 32 bits do."""
    want = Trial.of(spec).run(subject)
    kwargs = fresh(spec)
    pool, slots = kwargs["initial_state_source"], kwargs["initial_state_indices"]
    stride = 2**30 + 64
    far = torch.empty(5 * 2**29, dtype=pool.dtype).as_strided((3, *pool.shape[1:]), (stride, *pool[0].stride()))
    moved = [2, -1, -1]
    far[2] = pool[int(slots[0])]
    call = canonical_call(**{**with_slots(kwargs, moved), "initial_state_source": far})
    call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    try:
        with subject.engine.watch_addresses(call.tensors()):
            subject.run(call)
    except (Violation, BackendRaised):
        return True
    return not torch.equal(bits(call.out.flatten(0, 1)), bits(want.o))


def showing(backend, engine, means, case, where=""):
    """Whether the fault shows in each part of the configs that has to show it: see ``planted_faults``."""
    spec = CASES[case]
    tried = subjects(backend, engine, spec)
    call = Trial.of(spec).call
    truth = reference(call, chunk=tried[0].chunk(call))
    return [any(shows(means, subject, spec, truth) for subject in some) for some in parts(tried, where)]


def parts(tried, where):
    match where:
        case "":
            return [tried]
        case "first":
            return [tried[:1]]
        case _:
            kinds = {"group": (True,), "each": (True, False)}[where]
            return [[next(s for s in tried if s.config["group"] is kind)] for kind in kinds]


def shows(means, subject, spec, truth):
    """As ``shown_by``, where an error of the engine may be what shows it."""
    try:
        return shown_by(means, subject, spec, truth)
    except BackendRaised:
        if means in ("error", "misuse"):
            return True
        raise
