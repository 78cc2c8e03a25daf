"""Rounded operands: an evaluation that rounds as the formulas say is within bound and noise, and little else is."""

import pytest
import torch

from isokern.registry.backend import Chunked
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.gates import beta_of, log_decay, normalise
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import _allowance, _allowance_of_states, judge
from isokern.registry.ops.fused_sigmoid_gating.operands import OperandRounding, squared_norm
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


def scatter_of(distribution, lengths):
    spec = SPEC.but(distribution=distribution, lengths=lengths, v=128)
    call = canonical_call(**make_inputs(spec).kwargs)
    return reference(call, chunk=Chunked(CHUNK, rounded=True)).state_scatter


def test_of_one_token_all_errors_that_columns_share_are_its_own():
    part, most, root = scatter_of("typical", (1, 1))
    assert (part > 0).all()
    assert (part < 1).all()
    assert torch.equal(most, torch.ones_like(most))
    assert torch.allclose(root, torch.ones_like(root))


@pytest.mark.parametrize(("distribution", "few"), [("strong_decay", True), ("long_memory", False)])
def test_where_decay_is_strong_a_few_tokens_have_all_errors(distribution, few):
    """``most`` is the largest token's part, and ``root`` between its square root's and that of as many equal parts."""
    _, most, root = scatter_of(distribution, (200,))  # in four chunks: parts are handed on
    assert (most > 0.3).all() if few else (most < 0.1).all()
    assert (root <= most.sqrt() + 1e-12).all()
    assert (root >= 200**-0.5 - 1e-12).all()


def test_what_tokens_have_is_handed_on_from_chunk_to_chunk():
    """The 32 tokens of the last chunk alone could not be as even."""
    call = canonical_call(**make_inputs(SPEC.but(distribution="long_memory", lengths=(128,))).kwargs)
    _, most, root = reference(call, chunk=Chunked(32, rounded=True)).state_scatter
    assert (root < 32**-0.5).all()
    assert (most > 1 / 128).all()


def test_equal_parts_of_tokens_are_as_many_independent_errors():
    for n in (40, 200):
        even = torch.tensor([[1.0], [1 / n], [n**-0.5]], dtype=torch.float64)
        assert float(_allowance_of_states(even, 128)) == pytest.approx(_allowance(n))
    one = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert _allowance_of_states(one, 128).tolist() == pytest.approx([_allowance(1), _allowance(128)])


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


def test_columns_beside_one_another_do_not_meet():
    """Two groups of columns at once, of which the first has outputs: each as if it were alone, chunk after chunk."""
    random = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=random)  # noqa: E731
    q, k, v, other = normal(7, 2, 4), normal(7, 2, 4), normal(7, 2, 3), normal(7, 2, 5)
    decay, beta = normal(7, 2, 1).sigmoid(), normal(7, 2, 1).sigmoid()
    states, others = normal(1, 2, 4, 3), normal(1, 2, 4, 5)
    both = OperandRounding(7, torch.cat((states, others), -1), 3)
    first, second = OperandRounding(7, states), OperandRounding(7, others)
    for rows in (torch.arange(4)[None], torch.arange(4, 7)[None]):
        there = torch.ones_like(rows, dtype=torch.bool)
        both.add(rows, there, torch.cat((states, others), -1), q, k, torch.cat((v, other), -1), decay, beta)
        first.add(rows, there, states, q, k, v, decay, beta)
        second.add(rows, there, others, q, k, other, decay, beta)
    torch.testing.assert_close((both.o, both.o_typical), (first.o, first.o_typical))
    for name in ("column", "state", "shared"):
        alone = torch.cat((getattr(first, name), getattr(second, name)), -1)
        torch.testing.assert_close(getattr(both, name), alone)


def test_the_squared_norm_is_that_of_the_largest_singular_value():
    matrices = torch.randn(3, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices[0] = 0
    expected = torch.linalg.matrix_norm(matrices, 2).square()
    torch.testing.assert_close(squared_norm(matrices), expected, rtol=1e-12, atol=0)
