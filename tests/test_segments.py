"""Sequences cut into segments: an evaluation that finds the effect of each by itself is within bound, little else is.

The chunked form in float64, with operands rounded to bfloat16 or every result rounded to float32, segment by segment.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from isokern.registry.backend import Chunked
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.gates import beta_of, log_decay, normalise
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

SPEC = CaseSpec("segments", (330, 7, 130), h=1, hv=2, k=32, v=48, distribution="long_memory")
CHUNK, CUT = 64, 128


def exact(x):
    return x


def to_float(x):
    return x.float().double()


def to_bfloat(x):
    return x.to(torch.bfloat16).double()


@dataclass
class Evaluation:
    """One value head of one sequence: ``operand`` and ``result`` round what products take and what they give."""

    call: object
    n: int
    head: int
    operand: object
    result: object

    def chunk(self, S, first, last, out=None, values=True):
        """What a chunk makes of the states ``[K, columns]``; the columns beyond V have no values."""
        call, rows, operand, result = self.call, slice(first, last), self.operand, self.result
        q, k = (normalise(x[0, rows, self.head // 2].double()) for x in (call.q, call.k))
        v = torch.zeros(last - first, S.shape[1], dtype=torch.float64)
        if values:
            v[:, : call.value_dim] = call.v[0, rows, self.head].double()
        beta = beta_of(call.b[0, rows, self.head].double(), False)
        x = call.a[0, rows, self.head].double() + call.dt_bias[self.head].double()
        g = log_decay(call.A_log[self.head].double(), x, 1.0, 20.0, None).cumsum(0)
        past = torch.exp(g[:, None] - g[None]).tril()
        A = (beta[:, None] * past * (k @ k.T)).tril(-1)
        T = result(torch.linalg.inv(torch.eye(len(A), dtype=A.dtype) + A) * beta)
        R = result(v - result(g.exp()[:, None] * (k @ operand(S))))
        U = result(operand(T) @ operand(R))
        if out is not None:
            P = result(past * (q @ k.T)) * call.scale
            o = result(g.exp()[:, None] * (q @ operand(S)) * call.scale) + operand(P) @ operand(U)
            out[0, rows, self.head] = o.to(out.dtype)
        return result(g[-1].exp() * S + k.T @ operand(result(U * torch.exp(g[-1] - g)[:, None])))

    def run(self, join):
        """``join(M, S, B)`` is the next segment's start."""
        call = self.call
        K, V, (first, last) = call.key_dim, call.value_dim, call.offsets[self.n : self.n + 2]
        S = call.pool[call.read_slots[self.n], self.head].double()
        for begin in range(first, last, CUT):
            end = min(begin + CUT, last)
            local = torch.cat((torch.zeros(K, V, dtype=S.dtype), torch.eye(K, dtype=S.dtype)), 1)
            state = S
            for t in range(begin, end, CHUNK):
                state = self.chunk(state, t, min(t + CHUNK, end), call.out)
                local = self.chunk(local, t, min(t + CHUNK, end))
            S = self.result(join(local[:, V:], S, local[:, :V])) if end < last else state
        if last > first:
            call.pool[call.write_slots[self.n], self.head] = S.to(call.pool.dtype)


def judged(spec, operand, result, join=lambda M, S, B: M @ S + B, rounded=None, cut=CUT):
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.zeros_like(call.v)
    ref = reference(call, chunk=Chunked(CHUNK, operand is to_bfloat if rounded is None else rounded, cut))
    for n in range(call.n):
        for head in range(call.hv):
            Evaluation(call, n, head, operand, result).run(join)
    return judge(call, call.out, ref)


SPECS = [
    SPEC,
    SPEC.but(distribution="typical"),
    SPEC.but(distribution="strong_decay"),
    SPEC.but(distribution="equal_keys"),
    SPEC.but(lengths=(128, 129, 64), k=8, v=16),
    SPEC.but(k=64, v=8, lengths=(600,)),
    SPEC.but(state_dtype="bfloat16"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.distribution} {spec.lengths} {spec.state_dtype}")
@pytest.mark.parametrize("operand", [exact, to_bfloat], ids=["float32", "rounded"])
def test_joined_segments_are_within_the_bound(spec, operand):
    judgement = judged(spec, operand, exact if operand is to_bfloat else to_float)
    assert judgement.ok, judgement.faults
    assert 0.02 < judgement.ratio_o < 1, "the bound means something"


FAULTS = {
    "segments that begin with no state": lambda M, S, B: B,
    "segments that make nothing": lambda M, S, B: M @ S,
    "a state handed over as it was": lambda M, S, B: S,
    "a passage transposed": lambda M, S, B: M.T @ S + B,
    "one key left out": lambda M, S, B: M[:, 1:] @ S[1:] + B,
    "a passage in bfloat16": lambda M, S, B: to_bfloat(M) @ S + B,
    "a start in bfloat16": lambda M, S, B: to_bfloat(M @ S + B),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_joined_otherwise_is_found(fault):
    assert not judged(SPEC, exact, to_float, FAULTS[fault]).ok


@pytest.mark.parametrize("fault", [name for name in FAULTS if "bfloat16" not in name])
def test_so_it_is_with_rounded_operands(fault):
    assert not judged(SPEC, to_bfloat, exact, FAULTS[fault]).ok


def test_whole_sequences_have_the_bound_that_they_had():
    """A cut beyond every sequence is none."""
    call = canonical_call(**make_inputs(SPEC).kwargs)
    for rounded in (False, True):
        whole = reference(call, chunk=Chunked(CHUNK, rounded) if rounded else CHUNK)
        other = reference(call, chunk=Chunked(CHUNK, rounded, cut=512))
        assert torch.equal(whole.o_bound, other.o_bound)
        assert torch.equal(whole.state_bound, other.state_bound)


def test_cutting_widens_the_bound_little():
    call = canonical_call(**make_inputs(SPEC).kwargs)
    for rounded, most in ((False, 8.0), (True, 2.0)):
        whole = reference(call, chunk=Chunked(CHUNK, rounded) if rounded else CHUNK)
        other = reference(call, chunk=Chunked(CHUNK, rounded, CUT))
        ratio = other.state_bound / whole.state_bound
        assert 1 < float(ratio[0].max()) < most


@pytest.mark.parametrize("spec", SPECS[:4], ids=lambda spec: spec.distribution)
@pytest.mark.parametrize("operand", [exact, to_bfloat], ids=["float32", "rounded"])
def test_whole_sequences_are_within_the_bound_of_cut_ones(spec, operand, monkeypatch):
    """A backend may cut some sequences of a batch and leave others whole: one bound is for both."""
    call = canonical_call(**make_inputs(spec).kwargs)
    ref = reference(call, chunk=Chunked(CHUNK, operand is to_bfloat, CUT))
    call.out = torch.zeros_like(call.v)
    monkeypatch.setitem(globals(), "CUT", 1024)
    for n in range(call.n):
        for head in range(call.hv):
            Evaluation(call, n, head, operand, exact if operand is to_bfloat else to_float).run(None)
    judgement = judge(call, call.out, ref)
    assert judgement.ok, judgement.faults


@pytest.mark.parametrize(("chunk", "cut"), [(1, 1), (1, 2), (CHUNK, CUT)])
def test_with_rounded_operands_it_is_never_below_that_of_whole_sequences(chunk, cut):
    """A state along the keys: columns reinforce each other, and one rounding of their sum is the larger error."""
    call = canonical_call(**make_inputs(SPEC.but(distribution="equal_keys", lengths=(130,), k=64, v=8)).kwargs)
    key = normalise(call.k[0, 0].double()).repeat_interleave(2, 0)
    start = 100 * key[None, :, :, None].expand(1, 2, 64, 8)
    whole = reference(call, chunk=Chunked(chunk, True), initial=start)
    other = reference(call, chunk=Chunked(chunk, True, cut), initial=start)
    for name in ("o_bound", "state_bound", "o_noise", "state_noise"):
        assert bool((getattr(other, name) >= (1 - 1e-9) * getattr(whole, name)).all()), name
    # What there is more is shared as what there was: a cut opens no room for what each column has by itself.
    assert torch.allclose(other.state_scatter, whole.state_scatter, rtol=0.3)


def test_the_errors_of_joined_states_are_those_of_the_formula():
    """Three segments, each looked at as a sequence by itself, with K = V so that M has as many columns."""
    spec = CaseSpec("three", (24,), h=1, hv=2, k=6, v=6, distribution="long_memory")
    call = canonical_call(**make_inputs(spec).kwargs)
    underflow, unit = 2.0**-118, torch.eye(6, dtype=torch.float64).expand(1, 2, 6, 6)

    def alone(first, start, values=1):
        part = {name: getattr(call, name)[:, first : first + 8] for name in ("q", "k", "v", "a", "b")}
        part["v"] = part["v"] * values
        offsets = torch.tensor([0, 8], dtype=torch.int32)
        return reference(replace(call, **part, cu_seqlens=offsets, layout=None), chunk=4, initial=start)

    S, E = call.pool[call.read_slots].double(), torch.zeros(1, 2, 6, dtype=torch.float64)
    for first in (0, 8):
        M, B, then = alone(first, unit, values=0), alone(first, 0 * unit), alone(first, S).state
        own, passed = B.state_bound - underflow, M.state_bound - underflow
        torch.testing.assert_close(M.state @ S + B.state, then)
        met = torch.einsum("nhkv,nhk->nhv", S.abs(), passed)
        rounding = (6 * 6**0.5 + 2) * (M.state.abs() @ S.abs()).norm(dim=-2) + 2 * then.norm(dim=-2)
        E = torch.linalg.matrix_norm(M.state, 2)[..., None] * E + met + own + 2.0**-24 * rounding
        S = then
    x = call.a[0, 16:].double() + call.dt_bias.double()
    decay = log_decay(call.A_log.double(), x, 1.0, 20.0, None).sum(0).exp()[None, :, None]
    cut = reference(call, chunk=Chunked(4, cut=8))
    torch.testing.assert_close(cut.state_bound, decay * E + alone(16, S).state_bound, rtol=1e-10, atol=0)
