"""Rounded operands: an evaluation that rounds as the formulas say is within bound and noise, and little else is."""

import pytest
import torch

from isokern.registry.backend import Chunked
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.gates import beta_of, log_decay, normalise
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.operands import OperandRounding
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

SPEC = CaseSpec("operands", (150, 7, 64), h=1, hv=2, k=32, v=48)
CHUNK = 64


def to_nearest(x):
    return x.to(torch.bfloat16).double()


def truncated(x):
    return (x.float().view(torch.int32) & -65536).view(torch.float32).double()


def coarser(x, bits=7):
    """Less than the eight bits that bfloat16 has."""
    scale = 2.0 ** (x.abs().clamp_min(1e-30).log2().floor() - bits + 1)
    return torch.round(x / scale) * scale


def evaluate(call, of_state, of_value, of_matrix):
    """The chunked form in float64 with the operands of products rounded by these; writes out and pool."""
    for n, (first, last) in enumerate(zip(call.offsets, call.offsets[1:], strict=False)):
        for head in range(call.hv):
            S = call.pool[call.read_slots[n], head].double()
            for t in range(first, last, CHUNK):
                rows = slice(t, min(t + CHUNK, last))
                q, k = (normalise(x[0, rows, head // 2].double()) for x in (call.q, call.k))
                q = q * call.scale
                v = call.v[0, rows, head].double()
                beta = beta_of(call.b[0, rows, head].double(), call.allow_neg_eigval)
                x = call.a[0, rows, head].double() + call.dt_bias[head].double()
                g = log_decay(call.A_log[head].double(), x, 1.0, 20.0, None).cumsum(0)
                past = torch.exp(g[:, None] - g[None]).tril()
                A = (beta[:, None] * past * (k @ k.T)).tril(-1)
                T = torch.linalg.inv(torch.eye(len(A), dtype=A.dtype) + A) * beta
                P = past * (q @ k.T)
                rounded = of_state(S)
                R = v - g.exp()[:, None] * (k @ rounded)
                U = of_matrix(T) @ of_value(R)
                o = g.exp()[:, None] * (q @ rounded) + of_matrix(P) @ of_value(U)
                call.out[0, rows, head] = o.to(call.q.dtype)
                S = g[-1].exp() * S + k.T @ of_value(U * torch.exp(g[-1] - g)[:, None])
            call.pool[call.write_slots[n], head] = S.to(call.pool.dtype)


def judged(spec, of_state=to_nearest, of_value=to_nearest, of_matrix=to_nearest):
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.zeros_like(call.v)
    ref = reference(call, chunk=Chunked(CHUNK, rounded=True))
    evaluate(call, of_state, of_value, of_matrix)
    return judge(call, call.out, ref)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        SPEC.but(distribution="long_memory"),
        SPEC.but(distribution="strong_decay"),
        SPEC.but(distribution="equal_keys", neg_eigval=True),
        SPEC.but(distribution="tiny_keys"),
        SPEC.but(lengths=(1, 1, 2), v=8),
        SPEC.but(k=8, v=128, lengths=(500,)),
        SPEC.but(state_dtype="bfloat16"),
    ],
    ids=lambda spec: f"{spec.distribution} {spec.lengths} {spec.state_dtype}",
)
def test_operands_rounded_to_nearest_are_within_the_bound_and_the_noise(spec):
    judgement = judged(spec)
    assert judgement.ok, judgement.faults
    assert 0.02 < judgement.ratio_o < 1, "the bound means something"


def test_exact_operands_are_too():
    assert judged(SPEC, *3 * [lambda x: x]).ok


FAULTS = {
    "states with two bits less": {"of_state": lambda x: coarser(x, 6)},
    "values truncated": {"of_value": truncated},
    "matrices truncated": {"of_matrix": truncated},
    "all a bit short": dict.fromkeys(("of_state", "of_value", "of_matrix"), coarser),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_coarser_operands_are_found(fault):
    spec = SPEC.but(distribution="long_memory", lengths=(300, 64), v=128)
    judgement = judged(spec, **FAULTS[fault])
    assert not judgement.ok


def test_a_float32_evaluation_is_not_granted_the_noise():
    call = canonical_call(**make_inputs(SPEC).kwargs)
    call.out = torch.zeros_like(call.v)
    ref = reference(call, chunk=CHUNK)
    assert ref.o_noise is None
    evaluate(call, to_nearest, to_nearest, to_nearest)
    assert not judge(call, call.out, ref).ok


def test_bounds_grow_with_nothing_but_roundings():
    """Without a state and with gates that let nothing in there is nothing to round."""
    states = torch.zeros(1, 1, 4, 3, dtype=torch.float64)
    rounding = OperandRounding(5, states)
    tokens = torch.arange(5)[None]
    ones = torch.ones(5, 1, 1, dtype=torch.float64)
    q = torch.randn(5, 1, 4, dtype=torch.float64)
    live = torch.ones(1, 5, dtype=torch.bool)
    rounding.add(tokens, live, states, q, q, torch.randn(5, 1, 3, dtype=torch.float64), ones, 0 * ones)
    for squares in (rounding.o, rounding.o_typical, rounding.column, rounding.state):
        assert not squares.any()
