"""The reference by blocks and chunks: its bounds are those of the formulas taken token by token, at few operations."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isokern.registry.backend import Chunked
from isokern.registry.ops.fused_sigmoid_gating.call import Call
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.packing import Packing, settle
from isokern.registry.ops.fused_sigmoid_gating.reference import Reference, reference
from isokern.registry.ops.fused_sigmoid_gating.tokens import Tokens
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

SPEC = CaseSpec("parts", (70, 0, 23, 1, 23), h=1, hv=2, k=6, v=5, io_dtype="float32", gate_dtype="float32")
SPECS = {
    "gdn": SPEC,
    "kda": SPEC.but(is_kda=True),
    "no l2 norm": SPEC.but(l2norm=False, neg_eigval=True),
    "no decay left": SPEC.but(distribution="extreme"),
    "no decay left, kda": SPEC.but(distribution="extreme", is_kda=True),
    "chain": SPEC.but(verify="chain", distribution="long_memory"),
}
U32, UNDERFLOW = 2.0**-24, 2.0**-118


def _call(spec: CaseSpec) -> Call:
    return canonical_call(**make_inputs(spec).kwargs)


def _assert_close(ref: Reference, other: Reference) -> None:
    for ours, theirs in zip(ref.lasting(), other.lasting(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------
# The bound


def _token_by_token(call: Call, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``o_bound`` and ``state_bound`` of a call whose rows are all covered: E, M and F in a loop over the tokens."""
    heads, rows = torch.arange(call.hv), torch.arange(call.tokens)
    x, ref = Tokens.of(call, heads, rows, chunk), reference(call)
    m, c_n, sums = 6 * math.sqrt(call.key_dim), x.norm_error, 6 * math.sqrt(chunk)
    o_bound, state_bound = torch.zeros_like(x.v), torch.zeros(call.n, call.hv, call.value_dim, dtype=torch.float64)
    dot = lambda k, S: (k[..., None] * S).sum(-2)  # noqa: E731
    for n, (first, last) in enumerate(pairwise(call.offsets)):
        S = call.pool[call.read_slots[n]].double()
        E = torch.zeros(call.hv, call.value_dim, dtype=torch.float64)
        for t in range(first, last):
            decay, c_g, beta, k, q, v = (
                y[t] for y in (x.decay[..., None], x.decay_error[..., None], x.beta, x.k, x.q, x.v)
            )
            if chunk and (t - first) % chunk == 0:
                M, F = S.abs(), torch.zeros_like(S)
            decayed = decay * S
            d = dot(k, decayed)
            u = beta * (v - d)
            S = decayed + k[..., None] * u[:, None]
            local = x.value_weight[t] * (v.abs() + d.abs())
            if chunk:
                F = decay * F + c_g * decay * M
                local = local + x.k_gain[t] * dot(k.abs(), F + (m + sums + 4 * c_n + 4) * decay * M)
                M = decay * M + k.abs()[..., None] * u.abs()[:, None]
                shown = dot(q.abs(), F + (m + sums + 4 * c_n + 4) * M)
            else:
                local = local + ((c_g + 1) * decayed).norm(dim=-2) + 2 * S.norm(dim=-2)
                local = local + x.k_gain[t] * (m + 2 * c_n + 2) * dot(k.abs(), decayed.abs())
                shown = (m + c_n + 2) * dot(q.abs(), S.abs())
            E = x.growth[t] * E + U32 * local
            o_bound[t] = q.norm(dim=-1, keepdim=True) * E + U32 * shown + UNDERFLOW
            if chunk and (t + 1 == last or (t + 1 - first) % chunk == 0):
                E = E + U32 * (F + (sums + 2 * c_n + 4) * M).norm(dim=-2)
            if ref.steps is not None:
                torch.testing.assert_close(ref.steps[t], S, rtol=1e-11, atol=1e-13)
        state_bound[n] = E + UNDERFLOW * (last > first)
    return o_bound, state_bound


@pytest.mark.parametrize("chunk", [0, 1, 8, 23, 100])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_is_that_of_the_formulas_taken_token_by_token(spec, chunk):
    call = _call(spec)
    o_bound, state_bound = _token_by_token(call, chunk)
    ref = reference(call, chunk=chunk or None)
    torch.testing.assert_close(ref.o_bound, o_bound, rtol=1e-10, atol=0)
    torch.testing.assert_close(ref.state_bound, state_bound, rtol=1e-10, atol=0)
    if ref.steps_bound is not None:  # after its last token a sequence's state is the final one
        ends = [(n, last - 1) for n, (first, last) in enumerate(pairwise(call.offsets)) if last > first]
        for n, row in ends:
            torch.testing.assert_close(ref.steps_bound[row], state_bound[n], rtol=1e-10, atol=0)


@pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])
def test_decays_that_leave_nothing_do_not_blur_those_after(is_kda):
    """The error of ``exp(-1e17)`` in units of u is as large, and yet one of nothing."""
    call = _call(SPEC.but(is_kda=is_kda))
    call.A_log[0], call.a[:] = 40.0, -60.0
    call.a[0, 3::7], call.dt_bias[:] = 0.0, 0.0
    o_bound, state_bound = _token_by_token(call, 23)
    ref = reference(call, chunk=23)
    torch.testing.assert_close(ref.o_bound, o_bound, rtol=1e-10, atol=0)
    torch.testing.assert_close(ref.state_bound, state_bound, rtol=1e-10, atol=0)


CHUNKS = [None, 23, Chunked(8, cut=24), Chunked(8, rounded=True), Chunked(8, rounded=True, cut=16)]


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("reference", "_BLOCK", 1),
        ("reference", "_BLOCK", 1000),
        ("local_errors", "_TOGETHER", 1),
        ("local_errors", "_TOGETHER", 100),
    ],
)
@pytest.mark.parametrize("spec", [SPEC, SPEC.but(verify="chain")], ids=lambda spec: spec.verify)
def test_does_not_depend_on_what_is_looked_at_together(spec, chunk, module, name, value, monkeypatch):
    call = _call(spec)
    whole = reference(call, chunk=chunk)
    monkeypatch.setattr(f"isokern.registry.ops.fused_sigmoid_gating.{module}.{name}", value)
    _assert_close(reference(call, chunk=chunk), whole)


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_what_lasts_is_contiguous_and_holds_no_more_memory(chunk):
    for tensor in reference(_call(SPEC.but(verify="chain")), chunk=chunk).lasting():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 8 * tensor.numel()


@pytest.mark.parametrize("chunk", [None, 4, 16])
@pytest.mark.parametrize("name", ["q", "k", "v", "a", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])
def test_a_value_that_is_not_finite_does_not_reach_the_tokens_before(name, value, is_kda, chunk):
    call, other = (_call(SPEC.but(is_kda=is_kda)) for _ in range(2))
    getattr(other, name)[0, 30] = value
    ref, spoilt = reference(call, chunk=chunk), reference(other, chunk=chunk)
    for tensor, same in ((spoilt.o, ref.o), (spoilt.o_bound, ref.o_bound)):
        torch.testing.assert_close(tensor[:30], same[:30], rtol=1e-11, atol=0)
        torch.testing.assert_close(tensor[70:], same[70:], rtol=1e-11, atol=0)
    if math.isnan(value):
        assert torch.isnan(spoilt.o_bound[30]).all()


# ---------------------------------------------------------------------------------------------------------------
# What it costs


class _Operations(TorchDispatchMode):
    """Counts what would be a launch on a GPU."""

    VIEWS = frozenset(
        "view _unsafe_view expand transpose select slice unsqueeze squeeze split split_with_sizes permute detach alias "
        "unbind t".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_kda", [False, True], ids=["gdn", "kda"])
@pytest.mark.parametrize("chunk", [None, 64, Chunked(64, cut=128), Chunked(64, True), Chunked(64, True, 128)], ids=str)
def test_a_token_of_all_sequences_costs_a_few_operations(chunk, is_kda):
    def operations(length: int) -> int:
        call = _call(SPEC.but(lengths=(length, length - 7), is_kda=is_kda and not getattr(chunk, "rounded", False)))
        with _Operations() as counted:
            reference(call, chunk=chunk)
        return counted.count

    short, long = operations(256), operations(768)
    assert long - short <= 10 * 512, "four for the recurrences, the rest by block or chunk"


# ---------------------------------------------------------------------------------------------------------------
# The order of tokens


LENGTHS = [(3, 0, 5, 1, 5), (4, 4), (1,), (0, 0), ()]


def _packing(lengths: tuple[int, ...]) -> Packing:
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return Packing.of(tuple(offsets), torch.device("cpu"))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_token_has_one_position_place_by_place(lengths):
    packing = _packing(lengths)
    assert sorted(packing.rows.tolist()) == list(range(sum(lengths)))
    assert packing.longest == max(lengths, default=0)
    for t in range(packing.longest):
        here = packing.rows[packing.span(t, t + 1)].tolist()
        assert here == [packing.offsets[n] + t for n in packing.order if lengths[n] > t]
        assert packing.live(t) == len(here)
    assert packing.live(packing.longest) == 0


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("tokens", [0, 1, 4, 100])
def test_blocks_are_as_long_as_they_may_be(lengths, tokens):
    packing = _packing(lengths)
    blocks = list(packing.blocks(0, packing.longest, tokens))
    assert [t for first, last in blocks for t in range(first, last)] == list(range(packing.longest))
    for first, last in blocks:
        assert packing.bases[last] - packing.bases[first] <= tokens or last == first + 1
        if last < packing.longest:
            assert packing.bases[last + 1] - packing.bases[first] > tokens


@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 5), (3, 4), (3, 5)])
@pytest.mark.parametrize("lengths", [(3, 0, 5, 1, 5), (5, 5)])
def test_rectangles_hold_the_tokens_by_sequence(lengths, first, last):
    packing = _packing(lengths)
    rectangle = packing.rectangle(first, last)
    x = packing.rows.double()[:, None, None] * torch.tensor([1.0, 10.0])[None, :, None]  # two heads
    held = rectangle.of(x, missing=-1.0).view(-1, 2, last - first)
    live = [n for n in packing.order if lengths[n] > first]
    for i, n in enumerate(live):
        for t in range(first, last):
            expected = packing.offsets[n] + t if t < lengths[n] else None
            assert held[i, 0, t - first] == (-1 if expected is None else expected)
            assert held[i, 1, t - first] == (-1 if expected is None else 10 * expected)
            assert rectangle.there[i, t - first] == (expected is not None)
    span = packing.span(first, last)
    assert torch.equal(rectangle.packed(rectangle.of(x)), x[span])
    assert torch.equal(rectangle.of(x[span], before=span.start), rectangle.of(x))


def test_each_sequence_is_left_with_its_last_value():
    carried = torch.tensor([9.0, 9.0, 9.0, 9.0])
    settle(carried, [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0]), torch.tensor([6.0, 7.0])])
    assert carried.tolist() == [6.0, 7.0, 3.0, 9.0]
