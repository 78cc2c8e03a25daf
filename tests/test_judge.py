"""Sequences of one length are judged together, and each by its own limits."""

from __future__ import annotations

import pytest
import torch

from isokern import registry
from isokern.backends.torch_native.reference import run_reference
from isokern.registry.conformance.subject import Subject
from isokern.registry.ops.fused_sigmoid_gating import judge as judging
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.checks.trial import Trial
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

MIXED = CaseSpec("mixed", (5, 5, 5, 1, 1, 0, 3, 0, 0, 3), h=2, hv=4, k=16, v=24)
CASES = {
    "lengths": MIXED,
    "decode": MIXED.but(lengths=(1,) * 9),
    "bfloat16 states": MIXED.but(state_dtype="bfloat16", state_layout="vk", padded=(1, 3)),
    "tree": MIXED.but(verify="tree", update="disabled"),
    "no states": MIXED.but(state_dtype=None),
    "nothing": MIXED.but(lengths=()),
}


def run(case, heads=None):
    call = canonical_call(**make_inputs(case).kwargs)
    ref = reference(call, heads)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype)
    run_reference(call)
    return call, ref


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("error", [0.0, 1e-3, float("nan")])
def test_together_is_as_one_at_a_time(case, error, monkeypatch):
    call, ref = run(case, (0, 2))
    for written in (call.out, call.pool, call.intermediates):
        if written is not None and written.numel():
            written.view(-1)[::97] += error
    together = judging.judge(call, call.out, ref)
    monkeypatch.setattr(judging, "_TOGETHER", 1)
    alone = judging.judge(call, call.out, ref)
    assert together.faults == alone.faults
    assert [together.ratio_o, together.ratio_state, together.rel_o, together.equal_bits] == pytest.approx(
        [alone.ratio_o, alone.ratio_state, alone.rel_o, alone.equal_bits]
    )


def test_an_error_in_one_sequence_of_many_is_measured_against_that_one():
    """It is small beside the values of all the others."""
    case = MIXED.but(lengths=(4,) * 64)
    call, ref = run(case)
    exact = judging.judge(call, call.out, ref)
    assert exact.ok
    call.out[0, 4:8, 0] *= 1.02
    off = judging.judge(call, call.out, ref)
    assert off.rel_o == pytest.approx(0.02, rel=0.2)
    assert "relative error" in " ".join(off.faults)


def orthogonal(norm):
    """Decode steps with nothing left of the states, and in one head a query all but orthogonal to its key."""
    case = CaseSpec(
        "decode", (1,) * 64, h=2, hv=4, k=64, v=32, distribution="strong_decay", io_dtype="float32", l2norm=norm
    )
    call = canonical_call(**make_inputs(case).kwargs)
    call.a.fill_(60.0)
    call.A_log.fill_(2.0)
    q, k = call.q[0, 7, 1].double(), call.k[0, 7, 1].double()
    call.q[0, 7, 1] = (q - (q @ k) / (k @ k) * k).to(call.q.dtype)
    return call


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("backend", ["torch_vectorized", "torch_chunked", "numba_cpu"])
def test_an_output_that_cancels_is_as_far_off_as_a_float32_sum_must_be(backend, norm):
    call = orthogonal(norm)
    ref = reference(call)
    call.out = torch.full(call.v.shape, float("nan"))
    implementation = registry.backends("fused_sigmoid_gating")[backend]
    problem = call.problem("eager")
    implementation.bind(problem, implementation.configs(problem)[0])(call)
    found = judging.judge(call, call.out, ref)
    assert found.rel_o > 10 * judging.LIMITS["float32"].rel_l2
    assert found.ok, found.faults


@pytest.mark.parametrize("times", [0.5, 2.0])
def test_a_sixteenth_of_the_bound_is_the_limit_for_an_output_that_cancels(times):
    call = orthogonal(True)
    ref = reference(call)
    error = times * ref.o_bound[7, 2:].norm(dim=-1, keepdim=True) / 16
    assert (error[:, 0] > 1e-4 * ref.o[7, 2:].norm(dim=-1)).all()  # it does cancel
    value = ref.o.clone()
    value[7, 2:] += error * ref.o[7, 2:] / ref.o[7, 2:].norm(dim=-1, keepdim=True)
    call.out = value.float()[None]
    told = " ".join(judging.judge(call, call.out, ref).faults)
    assert ("output has relative error" in told) == (times > 1)


def test_two_tokens_do_not_cancel_at_once():
    case = CaseSpec("two tokens", (2,) * 8, h=2, hv=4, k=64, v=32, io_dtype="float32")
    call, ref = run(case)
    call.out = ref.o.float()[None] * (1 + 2e-5)
    assert "output has relative error" in " ".join(judging.judge(call, call.out, ref).faults)


@pytest.mark.parametrize("verify", ["none", "chain"])
def test_a_state_of_one_number_is_held_to_its_bound_where_it_crosses_zero(verify):
    """Its relative error is then as large as one likes, in every right kernel."""
    spec = CaseSpec(
        "x", (40,) * 12, h=2, hv=8, k=1, v=1, distribution="long_memory", io_dtype="float32", gate_dtype="float32",
        verify=verify,
    )  # fmt: skip
    backend = registry.backends("fused_sigmoid_gating")["torch_vectorized"]
    verdicts = []
    for seed in range(6):
        trial = Trial.of(spec, seed)
        exact = reference(trial.call)
        trial.run(Subject(backend))
        verdicts.append(judging.judge(trial.call, trial.out, exact))
        assert verdicts[-1].ok, verdicts[-1].faults
    assert max(v.rel_state for v in verdicts) > judging.LIMITS["float32"].rel_l2, "one of them does cross it"
    trial.call.pool[trial.call.write_slots[0].long()] += 0.01
    assert not judging.judge(trial.call, trial.out, exact).ok
