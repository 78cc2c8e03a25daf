"""The float64 reference agrees with the formula written out in loops, and its bound separates right from wrong."""

from __future__ import annotations

import math
from functools import lru_cache

import mpmath
import numpy as np
import pytest
import torch

from isokern.registry.backend import Config
from isokern.registry.ops.fused_sigmoid_gating.call import Call
from isokern.registry.ops.fused_sigmoid_gating.case import DISTRIBUTIONS, CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.gates import log_decay
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.mutants import mutant
from isokern.registry.ops.fused_sigmoid_gating.reference import Reference, reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

SMALL = CaseSpec("small", (4, 0, 3, 1), h=2, hv=4, k=5, v=3, io_dtype="float32", gate_dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are small: handing them to threads costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _call(spec: CaseSpec, seed: int | None = None) -> Call:
    return canonical_call(**make_inputs(spec, seed).kwargs)


# ---------------------------------------------------------------------------------------------------------------
# The formula, in loops


def _softplus(x: float, beta: float, threshold: float) -> float:
    return x if beta * x > threshold else math.log1p(math.exp(beta * x)) / beta


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _unit(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(sum(float(e) ** 2 for e in x) + 1e-6)


def naive(call: Call) -> tuple[np.ndarray, list[np.ndarray], dict[tuple[int, int, int], np.ndarray]]:
    """o ``[tokens, HV, V]``, final states per sequence ``[HV, K, V]``, and the state after (n, t) of head i."""
    flat = lambda t: t.double().flatten(0, 1).numpy()  # noqa: E731
    q, k, v, a, b = (flat(t) for t in (call.q, call.k, call.v, call.a, call.b))
    A_log, bias = call.A_log.double().numpy(), call.dt_bias.double().numpy()
    n_slots = 0 if call.pool is None else call.pool.shape[0]
    o = np.full((call.tokens, call.hv, call.value_dim), np.nan)
    finals, after = [], {}
    for n in range(call.n):
        first, last = call.offsets[n], call.offsets[n + 1]
        slot = -1 if call.read_slots is None else int(call.read_slots[n])
        row = -1 if call.intermediate_rows is None else int(call.intermediate_rows[n])
        final = np.zeros((call.hv, call.key_dim, call.value_dim))
        for i in range(call.hv):
            j = i // (call.hv // call.h)
            start = np.zeros((call.key_dim, call.value_dim))
            if 0 <= slot < n_slots:
                stored = call.pool[slot, i].double().numpy()
                start = stored if call.state_layout == "kv" else stored.T
            S = start.copy()
            for t in range(first, last):
                if call.parents is not None and row >= 0 and t > first:
                    parent = int(call.parents[n, t - first])
                    S = start.copy() if parent < 0 else after[n, parent, i].copy()
                    if parent >= 0 and call.intermediates.element_size() == 2:
                        S = torch.from_numpy(S).to(call.intermediates.dtype).double().numpy()
                g = np.zeros(call.key_dim)
                for c in range(call.key_dim):
                    x = a[t, i, c] + bias[i, c] if call.is_kda else a[t, i] + bias[i]
                    if call.lower_bound is not None:
                        g[c] = call.lower_bound * _sigmoid(math.exp(A_log[i]) * x)
                    else:
                        g[c] = -math.exp(A_log[i]) * _softplus(x, call.softplus_beta, call.softplus_threshold)
                beta = _sigmoid(b[t, i]) * (2 if call.allow_neg_eigval else 1)
                query, key = q[t, j], k[t, j]
                if call.use_qk_l2norm:
                    query, key = _unit(query), _unit(key)
                query = query * call.scale
                S = np.exp(g)[:, None] * S
                u = beta * (v[t, i] - S.T @ key)
                S = S + np.outer(key, u)
                o[t, i] = S.T @ query
                after[n, t - first, i] = S
            final[i] = S
        finals.append(final)
    return o, finals, after


FEATURES = {
    "gdn": SMALL,
    "kda": SMALL.but(is_kda=True),
    "lower bound": SMALL.but(is_kda=True, lower_bound=-5.0),
    "negative eigenvalues": SMALL.but(neg_eigval=True),
    "no l2 norm": SMALL.but(l2norm=False),
    "no l2 norm, negative eigenvalues": SMALL.but(l2norm=False, neg_eigval=True),
    "scale": SMALL.but(scale=0.3),
    "softplus": SMALL.but(softplus_beta=2.0, softplus_threshold=0.5),
    "vk": SMALL.but(state_layout="vk"),
    "bfloat16": SMALL.but(io_dtype="bfloat16", gate_dtype="bfloat16", state_dtype="bfloat16"),
    "float16": SMALL.but(io_dtype="float16", gate_dtype="float16", state_dtype="float16"),
    "no state": SMALL.but(state_dtype=None),
    "padded": SMALL.but(padded=(0, 3)),
    "separate slots": SMALL.but(update="separate", fresh=(2,), padded=(3,)),
    "read only": SMALL.but(update="disabled"),
    "chain": SMALL.but(verify="chain", padded=(2,)),
    "tree": SMALL.but(verify="tree", padded=(2,), lengths=(6, 0, 5, 1)),
    "tree, bfloat16 buffer": SMALL.but(verify="tree", lengths=(6, 5), intermediate_dtype="bfloat16", state_layout="vk"),
    "tree, float16 buffer": SMALL.but(verify="tree", lengths=(6, 5), intermediate_dtype="float16", is_kda=True),
    "batch": SMALL.but(varlen=False, lengths=(3, 3)),
    "strides": SMALL.but(strides="any", extra_rows=2, is_kda=True),
    "one q head": SMALL.but(h=1, hv=3),
    "as many q as v heads": SMALL.but(h=3, hv=3),
    "layout": SMALL.but(as_layout=True, cu_dtype="int64", index_dtype="int64"),
    **{f"values: {d}": SMALL.but(distribution=d) for d in DISTRIBUTIONS},
}


@pytest.mark.parametrize("spec", FEATURES.values(), ids=FEATURES)
def test_equals_the_formula_in_loops(spec: CaseSpec):
    call = _call(spec)
    o, finals, after = naive(call)
    ref = reference(call)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12 * np.nanmax(np.abs(y), initial=0))  # noqa: E731

    close(ref.o.numpy(), o)
    for n, final in enumerate(finals):
        close(ref.state[n].numpy(), final)
    assert (ref.steps is None) == (spec.verify == "none")
    if ref.steps is not None:
        for (n, t, i), state in after.items():
            close(ref.steps[ref.offsets[n] + t, i].numpy(), state)


def test_rows_beyond_the_last_offset_have_no_value():
    ref = reference(_call(SMALL.but(extra_rows=2)))
    assert torch.isnan(ref.o[-2:]).all()
    assert torch.isfinite(ref.o[:-2]).all()


def test_reads_the_call_and_writes_nothing():
    inputs = make_inputs(SMALL.but(verify="tree"))
    copy = inputs.clone()
    reference(canonical_call(**inputs.kwargs))
    for name, value in inputs.kwargs.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, copy.kwargs[name]), name


# ---------------------------------------------------------------------------------------------------------------
# Degenerate batches, subsets of heads


@pytest.mark.parametrize("verify", ["none", "chain", "tree"])
@pytest.mark.parametrize(("lengths", "varlen"), [((), True), ((), False), ((0, 0), True), ((0, 0), False)])
@pytest.mark.parametrize("chunk", [None, 4])
def test_no_sequence_and_no_token(lengths, varlen, verify, chunk):
    call = _call(SMALL.but(lengths=lengths, varlen=varlen, verify=verify))
    ref = reference(call, chunk=chunk)
    assert ref.o.shape == (0, 4, 3)
    assert ref.state.shape == (len(lengths), 4, 5, 3)
    assert not ref.state_bound.any()
    for n in range(len(lengths)):  # a sequence without tokens keeps its state
        assert torch.equal(ref.state[n], call.pool[call.read_slots[n]].double())


@pytest.mark.parametrize("spec", [SMALL, SMALL.but(is_kda=True, verify="tree"), SMALL.but(state_layout="vk")], ids=str)
@pytest.mark.parametrize("chunk", [None, 2])
def test_some_heads_are_those_of_the_whole(spec, chunk):
    call = _call(spec)
    whole, some = reference(call, chunk=chunk), reference(call, heads=(3, 1), chunk=chunk)
    assert some.heads == (3, 1)
    for name, axis in (("o", 1), ("o_bound", 1), ("state", 1), ("state_bound", 1), ("steps", 1), ("steps_bound", 1)):
        if getattr(whole, name) is not None:
            expected = getattr(whole, name).index_select(axis, torch.tensor([3, 1]))
            assert torch.allclose(getattr(some, name), expected, rtol=1e-12, atol=0, equal_nan=True), name


def test_states_carried_exactly_by_the_caller():
    call = _call(SMALL)
    start = torch.randn(4, 4, 5, 3, dtype=torch.float64)
    ref = reference(call, initial=start)
    assert torch.equal(ref.state[1], start[1])
    assert not torch.allclose(ref.state[0], reference(call).state[0])


# ---------------------------------------------------------------------------------------------------------------
# The bound


def _float32_loops(call: Call, backwards: bool) -> torch.Tensor:
    """A token-by-token float32 evaluation that adds the K products one after another, or in reverse order."""
    f32 = lambda t: t.float().flatten(0, 1)  # noqa: E731
    group = call.hv // call.h
    q, k = (f32(t).repeat_interleave(group, 1) for t in (call.q, call.k))
    v, b, x = f32(call.v), f32(call.b), f32(call.a) + call.dt_bias.float()
    A_log = call.A_log.float()
    order = range(call.key_dim - 1, -1, -1) if backwards else range(call.key_dim)

    def dot(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(rows[..., 0, :])
        for c in order:
            total = total + rows[..., c, :] * vector[..., c, None]
        return total

    unit = lambda t: t / (dot(t[..., None], t) + 1e-6).sqrt()  # noqa: E731
    q, k = unit(q) * call.scale, unit(k)
    g = log_decay(A_log[:, None] if call.is_kda else A_log, x, 1.0, 20.0, None)
    decay = torch.exp(g) if call.is_kda else torch.exp(g)[..., None]
    beta = torch.sigmoid(b)[..., None]
    for n in range(call.n):
        slot = int(call.read_slots[n])
        S = call.pool[slot].float()
        for t in range(call.offsets[n], call.offsets[n + 1]):
            S = S * decay[t][..., None]
            u = beta[t] * (v[t] - dot(S, k[t]))
            S = S + k[t][..., None] * u[:, None, :]
            call.out[0, t] = dot(S, q[t])
        call.pool[slot] = S
    return call.out


@lru_cache
def _reference(spec: CaseSpec) -> Reference:
    return reference(_call(spec))


BOUND_CASE = CaseSpec("bound", (40, 0, 9), k=24, v=20)


@pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("io_dtype", ["float32", "bfloat16"])
def test_holds_for_two_orders_of_summation(distribution, is_kda, io_dtype):
    spec = BOUND_CASE.but(distribution=distribution, is_kda=is_kda, io_dtype=io_dtype)
    for backwards in (False, True):
        call = _call(spec)
        call.out = torch.empty_like(call.v)
        judgement = judge(call, _float32_loops(call, backwards), _reference(spec))
        assert judgement.ok, judgement.faults
        assert judgement.ratio_state < 0.5, "a correct evaluation stays well inside"


@pytest.mark.parametrize("name", ["g_bf16", "beta_bf16", "qk_bf16", "h_bf16", "tf32", "trunc", "eps1e-5"])
@pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])
def test_is_exceeded_by_lower_precision(name, is_kda):
    worst = 0.0
    for distribution in ("typical", "tiny_keys"):
        spec = BOUND_CASE.but(distribution=distribution, is_kda=is_kda)
        call = _call(spec)
        call.out = torch.empty_like(call.v)
        runner = mutant(name).bind(call.problem(), Config())
        judgement = judge(call, runner(call), _reference(spec))
        worst = max(worst, judgement.ratio_o, judgement.ratio_state)
    assert worst > 1.5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])
def test_allows_chunked_evaluations_more(distribution, is_kda):
    call = _call(BOUND_CASE.but(distribution=distribution, is_kda=is_kda))
    recurrent, chunked = reference(call), reference(call, chunk=16)
    assert torch.equal(recurrent.o, chunked.o)
    assert torch.equal(recurrent.state, chunked.state)
    assert (chunked.state_bound >= recurrent.state_bound).all()
    wider = chunked.o_bound >= recurrent.o_bound  # not everywhere: products are bounded in another order
    assert wider.double().mean() > 0.95
    assert chunked.o_bound.sum() > recurrent.o_bound.sum()
    assert chunked.o_bound.max() < 1e-2 * chunked.o.abs().max(), "wider, yet no licence"


def test_does_not_grow_with_length_without_decay():
    # ||I - beta k k^T|| <= 1, so local errors add up; they are not amplified.
    call = _call(CaseSpec("long", (256,), h=1, hv=1, k=16, v=4, distribution="long_memory"))
    bound = reference(call).o_bound[:, 0].amax(-1)
    assert bound[-1] < 40 * bound[:8].mean()


# ---------------------------------------------------------------------------------------------------------------
# The gate

X = [-200, -103.9, -88, -60, -37.5, -36.5, -20, -17.1, -16.9, -5, -1, -1e-3, 0, 1e-3, 1, 5, 19.9, 20, 20.1, 88, 200]
A_LOG = [-20.0, -5.0, -1e-3, 0.0, 2.7, 6.0, 20.0, 88.0, 100.0]


def _exact(A_log: float, x: float, beta: float, threshold: float, lower_bound: float | None) -> mpmath.mpf:
    A_log, x, beta = mpmath.mpf(A_log), mpmath.mpf(x), mpmath.mpf(beta)
    if lower_bound is not None:
        return lower_bound / (1 + mpmath.exp(-mpmath.exp(A_log) * x))
    softplus = x if beta * x > threshold else mpmath.log1p(mpmath.exp(beta * x)) / beta
    return -mpmath.exp(A_log) * softplus


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 2.0**-53), (torch.float32, 2.0**-24)], ids=["f64", "f32"])
@pytest.mark.parametrize(("beta", "threshold"), [(1.0, 20.0), (0.5, 3.0), (2.0, 60.0)])
def test_log_decay_is_accurate(dtype, unit, beta, threshold):
    """Within 4 units of exp(A_log) * softplus(x), counting one more per unit of the exponent that exp is given."""
    x = torch.tensor(X, dtype=dtype)
    smallest = torch.finfo(dtype).tiny
    with mpmath.workdps(60):
        for A_log in torch.tensor(A_LOG, dtype=dtype):
            got = log_decay(A_log, x, beta, threshold, None)
            for xi, g in zip(x.tolist(), got.tolist(), strict=True):
                exact = _exact(A_log.item(), xi, beta, threshold, None)
                if exact < -1e4:
                    assert g < -1e4, "a decay of 0, whatever exp(A_log) does to a smaller dtype"
                    continue
                exponent = abs(A_log.item()) + abs(min(beta * xi, 0.0))
                allowed = (4 + exponent) * unit * abs(exact) + smallest
                assert abs(g - exact) <= allowed, (A_log.item(), xi, g, exact)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 2.0**-53), (torch.float32, 2.0**-24)], ids=["f64", "f32"])
def test_bounded_log_decay_is_accurate(dtype, unit):
    x = torch.tensor(X, dtype=dtype)
    with mpmath.workdps(60):
        for A_log in torch.tensor(A_LOG, dtype=dtype):
            got = log_decay(A_log, x, 1.0, 20.0, -5.0)
            for xi, g in zip(x.tolist(), got.tolist(), strict=True):
                y = mpmath.exp(mpmath.mpf(A_log.item())) * xi
                exact = _exact(A_log.item(), xi, 1.0, 20.0, -5.0)
                sensitivity = abs(y) * mpmath.exp(-abs(y)) if y >= 0 else abs(y)  # d log(sigmoid) / d log(y)
                allowed = (4 + (4 + abs(A_log.item())) * sensitivity) * unit * abs(exact) + torch.finfo(dtype).tiny
                assert abs(g - exact) <= allowed, (A_log.item(), xi, g, exact)


def test_log_decay_keeps_sign_and_order():
    x = torch.linspace(-200, 200, 4001)
    g = log_decay(torch.tensor(1.3), x, 1.0, 20.0, None)
    assert (g <= 0).all()
    assert (g.diff() <= 0).all(), "a larger x never decays less"


def test_a_huge_rate_never_meets_a_vanished_softplus():
    g = log_decay(torch.tensor([88.0, 100.0]), torch.tensor(-200.0), 1.0, 20.0, None)
    assert torch.isfinite(g).all()
    assert torch.allclose(g.double(), -torch.exp(torch.tensor([-112.0, -100.0], dtype=torch.float64)), rtol=2e-5)
