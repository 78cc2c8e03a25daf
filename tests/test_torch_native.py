"""The torch backends: what each computes, declines, leaves alone, and how much memory it takes."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from isokern.backends.torch_native import chunked_grad, precision, triangular
from isokern.backends.torch_native.backends import TorchChunked, TorchReference, TorchVectorized
from isokern.backends.torch_native.budget import block_bytes
from isokern.backends.torch_native.chunked import run_chunked
from isokern.backends.torch_native.precision import full_precision
from isokern.backends.torch_native.reference import run_reference
from isokern.backends.torch_native.sequences import Heads, Sequences, blocks, head_blocks
from isokern.backends.torch_native.vectorized import run_vectorized
from isokern.registry.decision import RejectCode
from isokern.registry.ops.fused_sigmoid_gating.case import DISTRIBUTIONS, CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

# Sequence 1 is empty and names a slot, sequence 2 has no slot; nothing divides anything.
BASE = CaseSpec("base", (19, 0, 9, 1, 4), k=16, v=10, padded=(2,), extra_rows=2, io_dtype="float32")

VARIATIONS = {
    "gdn": BASE,
    "kda": BASE.but(is_kda=True),
    "kda-bounded": BASE.but(is_kda=True, lower_bound=-5.0),
    "low-precision": BASE.but(io_dtype="bfloat16", state_dtype="float16"),
    "neg-eigval": BASE.but(neg_eigval=True),
    "no-l2norm": BASE.but(l2norm=False, scale=0.3),
    "softplus": BASE.but(softplus_beta=2.0, softplus_threshold=1.0),
    "vk": BASE.but(state_layout="vk"),
    "vk-strided": BASE.but(state_layout="vk", strides="any", is_kda=True),
    "rows": BASE.but(strides="rows"),
    "separate": BASE.but(update="separate", fresh=(0, 4), index_dtype="int64", cu_dtype="int64"),
    "disabled": BASE.but(update="disabled"),
    "stateless": BASE.but(state_dtype=None),
    "batch": BASE.but(varlen=False, lengths=(7, 7, 7), extra_rows=0, strides="rows"),
    "equal-lengths": BASE.but(lengths=(5, 5, 5, 5)),
    "one-key-head": BASE.but(h=1, hv=6),
    "ungrouped": BASE.but(h=3, hv=3, as_layout=True),
    "all-empty": BASE.but(lengths=(0, 0, 0)),
    "no-sequences": BASE.but(lengths=(), padded=(), extra_rows=0),
}
VERIFY = {
    "chain": BASE.but(verify="chain"),
    "tree": BASE.but(verify="tree"),
    "tree-bf16-vk": BASE.but(verify="tree", intermediate_dtype="bfloat16", state_layout="vk", is_kda=True),
    "chain-disabled": BASE.but(verify="chain", update="disabled"),
}
# Small blocks cut between sequences and between heads, and inside a group of value heads.
RUNNERS = {
    "reference": (run_reference, None),
    "vectorized": (lambda call: run_vectorized(call, 1024), None),
    "vectorized-small-blocks": (lambda call: run_vectorized(call, 1), None),
    "vectorized-device-slots": (lambda call: run_vectorized(call, 5, slots_on_host=False), None),
    "vectorized-masked": (lambda call: run_vectorized(call, 1024, False, False), None),
    "vectorized-masked-blocks": (lambda call: run_vectorized(call, 3, False, False), None),
    "chunked-8": (lambda call: run_chunked(call, 8, 1024), 8),
    "chunked-16-small-blocks": (lambda call: run_chunked(call, 16, 1), 16),
    "chunked-16-device-slots": (lambda call: run_chunked(call, 16, 1024, slots_on_host=False), 16),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors here are tiny: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def exact_results(spec, chunk):
    return reference(canonical_call(**make_inputs(spec).kwargs), chunk=chunk)


def check_run(spec, run, chunk):
    """Run into a NaN-filled output; demand the error bound, and that nothing else was written."""
    inputs = make_inputs(spec)
    before = inputs.clone()
    call = canonical_call(**inputs.kwargs)
    call.out = torch.full_like(call.v, math.nan)
    out = run(call)
    assert out is call.out
    judgement = judge(call, out, exact_results(spec, chunk))
    assert judgement.ok, judgement.faults
    lengths = [y - x for x, y in zip(call.offsets, call.offsets[1:], strict=False)]
    assert bool(out.flatten(0, 1)[call.offsets[-1] :].isnan().all()), "rows beyond the last offset"
    if inputs.pool_storage is not None:
        slots = [] if call.write_slots is None else call.write_slots.tolist()
        stored = {s + 1 for s, length in zip(slots, lengths, strict=False) if s >= 0 and length}
        for s, state in enumerate(inputs.pool_storage):
            assert (s in stored) or torch.equal(state, before.pool_storage[s]), f"slot {s - 1}"
    if inputs.intermediate_storage is not None:
        steps = {r + 1: length for r, length in zip(call.intermediate_rows.tolist(), lengths, strict=True) if r >= 0}
        for r, row in enumerate(inputs.intermediate_storage):
            kept = steps.get(r, 0)
            assert torch.equal(row[kept:], before.intermediate_storage[r, kept:]), f"row {r - 1}"
    for name, value in inputs.kwargs.items():
        if isinstance(value, torch.Tensor) and name not in ("initial_state_source", "intermediate_states_buffer"):
            assert torch.equal(value, before.kwargs[name]), name


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("variation", VARIATIONS)
def test_is_within_the_bound_and_writes_nothing_else(variation, runner):
    check_run(VARIATIONS[variation], *RUNNERS[runner])


@pytest.mark.parametrize("runner", [name for name in RUNNERS if not name.startswith("chunked")])
@pytest.mark.parametrize("variation", VERIFY)
def test_verification(variation, runner):
    check_run(VERIFY[variation], *RUNNERS[runner])


@pytest.mark.parametrize("kda", [False, True], ids=["gdn", "kda"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chunks_keep_the_bound_on_every_distribution(distribution, kda):
    spec = BASE.but(lengths=(150,), padded=(), k=32, v=24, distribution=distribution, is_kda=kda)
    for chunk in (16, 128):
        check_run(spec, lambda call, chunk=chunk: run_chunked(call, chunk, 1024), chunk)


def test_lengths_that_decay_to_nothing_leave_no_nan():
    """A decay of exp(-huge) inside a chunk: segment sums reach -inf, and no -inf meets another's opposite."""
    spec = BASE.but(lengths=(40,), padded=(), extra_rows=0)
    for kda in (False, True):
        call = canonical_call(**make_inputs(spec.but(is_kda=kda)).kwargs)
        call.A_log.fill_(95.0)
        call.out = torch.full_like(call.v, math.nan)
        assert bool(run_chunked(call, 16, 1024).isfinite().all())


# ---- gradients


TINY = CaseSpec(
    "tiny",
    (5, 0, 9, 1),
    k=4,
    v=3,
    io_dtype="float64",
    gate_dtype="float64",
    A_log_dtype="float64",
    dt_bias_dtype="float64",
    state_dtype="float64",
    update="disabled",
    padded=(3,),
    extra_rows=2,
)
DIFFERENTIABLE = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "initial_state_source")


def differentiable(spec, run):
    kwargs = make_inputs(spec).kwargs
    leaves = [kwargs[name].clone().requires_grad_() for name in DIFFERENTIABLE]
    return lambda *values: run(canonical_call(**kwargs | dict(zip(DIFFERENTIABLE, values, strict=True)))), leaves


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        TINY.but(is_kda=True),
        TINY.but(varlen=False, lengths=(6, 6), padded=(), extra_rows=0, state_layout="vk", l2norm=False),
    ],
    ids=["gdn", "kda", "batch-vk"],
)
def test_gradients(spec):
    by_token, leaves = differentiable(spec, run_reference)
    by_chunk, _ = differentiable(spec, lambda call: chunked_grad.run_chunked_grad(call, 4))
    assert torch.autograd.gradcheck(by_token, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(by_chunk, leaves, fast_mode=True)
    first, second = by_token(*leaves), by_chunk(*leaves)
    weights = torch.randn(first.shape, dtype=first.dtype, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((first * weights).sum(), leaves)
    given = torch.autograd.grad((second * weights).sum(), leaves)
    for name, x, y in zip(DIFFERENTIABLE, given, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, msg=name)


def test_training_still_updates_the_pool():
    spec = TINY.but(update="in_place")
    trained, plain = make_inputs(spec), make_inputs(spec)
    call = canonical_call(**trained.kwargs | {"q": trained.kwargs["q"].requires_grad_()})
    assert chunked_grad.run_chunked_grad(call, 4).requires_grad
    run_reference(canonical_call(**plain.kwargs))
    torch.testing.assert_close(trained.pool_storage, plain.pool_storage, rtol=1e-12, atol=1e-12)


# ---- what is declined


def problem_of(**changes):
    return replace(canonical_call(**make_inputs(BASE).kwargs).problem(), **changes)


def test_unknown_lengths_are_declined_with_the_way_out():
    on_device = problem_of(device="cuda", lengths_on_host=False)
    for backend in (TorchReference(), TorchChunked()):
        verdict = backend.check(on_device)
        assert (verdict.code, "SequenceLayout" in verdict.reason) == (RejectCode.FEATURE, True)
    assert TorchVectorized().check(on_device)


def test_chunks_decline_verification_and_blocks_decline_gradients():
    assert TorchChunked().check(problem_of(intermediates="tree")).code is RejectCode.FEATURE
    assert TorchVectorized().check(problem_of(grad=True)).code is RejectCode.GRAD
    assert TorchChunked().check(problem_of(grad=True))


def test_every_config_runs_and_prompts_prefer_chunks():
    for backend in (TorchReference(), TorchVectorized(), TorchChunked()):
        call = canonical_call(**make_inputs(BASE).kwargs)
        problem = call.problem()
        for config in backend.configs(problem):
            call.out = torch.full_like(call.v, math.nan)
            backend.bind(problem, config)(call)
            assert bool(call.out[0, : call.offsets[-1]].isfinite().all()), config.label
    decode = canonical_call(**make_inputs(BASE.but(lengths=(1, 1, 1))).kwargs).problem()
    assert TorchChunked().rank(decode) < TorchVectorized().rank(decode)
    assert TorchChunked().rank(problem) > TorchVectorized().rank(problem)


def test_the_fingerprint_covers_the_gates():
    names = {path.name for path in TorchVectorized().sources()}
    assert {"gates.py", "states.py", "chunk_terms_kda.py", "precision.py"} <= names
    assert "torch" in TorchChunked().toolchain()


# ---- precision


@pytest.fixture
def reduced_products():
    """bf16 products allowed process-wide, as ``torch.set_float32_matmul_precision("medium")`` does."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("reduced_products")
def test_reduced_precision_products_are_kept_out_and_put_back():
    switch = precision._matmul_switch("cpu")
    before = precision._read(switch)
    assert before not in ("none", "ieee", "highest")
    with full_precision(torch.device("cpu")):
        assert precision._read(switch) in ("ieee", "highest")
    assert precision._read(switch) == before
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("runner", ["vectorized", "chunked-8"])
def test_autocast_does_not_leak_in(runner):
    run, chunk = RUNNERS[runner]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_run(BASE, run, chunk)


def test_inverses_by_halves_equal_the_solver():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 32, 32, generator=generator, dtype=torch.float64) * 0.3
    R = torch.randn(3, 32, 5, generator=generator, dtype=torch.float64)
    expected = torch.linalg.solve_triangular(A, R, upper=False, unitriangular=True)
    torch.testing.assert_close(triangular.solve_unit_lower(A, R.clone()), expected)
    big = torch.block_diag(A[0], A[1], A[2], A[0])[None]
    big[0, 64:, :32] = A[1].repeat(2, 1)
    R = torch.randn(1, 128, 5, generator=generator, dtype=torch.float64)
    expected = torch.linalg.solve_triangular(big, R, upper=False, unitriangular=True)
    torch.testing.assert_close(triangular.solve_unit_lower(big, R.clone()), expected)


# ---- blocks


@pytest.mark.parametrize(("hv", "group", "most"), [(32, 2, 12), (32, 32, 8), (6, 3, 2), (5, 1, 5), (4, 2, 0)])
def test_head_blocks_cover_every_head_once_with_its_key_head(hv, group, most):
    found = list(head_blocks(hv, group, most))
    assert [h for b in found for h in range(b.first, b.first + b.count)] == list(range(hv))
    for b in found:
        assert b.count <= max(most, 1)
        keys = [h // group for h in range(b.first, b.first + b.count)]
        assert keys == [b.first_key + i // b.group for i in range(b.count)]


def test_blocks_hold_at_most_the_states_asked_for():
    call = canonical_call(**make_inputs(BASE).kwargs)
    sequences = Sequences(call, on_host=True)
    assert sequences.lengths == (19, 9, 4, 1)  # longest first, the empty one left out
    for states in (1, 3, 4, 9, 100):
        pairs = [
            (i, h)
            for b in blocks(sequences, call.hv, 2, states)
            for i in range(b.first, b.last)
            for h in range(b.heads.first, b.heads.first + b.heads.count)
        ]
        assert sorted(pairs) == [(i, h) for i in range(4) for h in range(call.hv)]
        assert all(b.n * b.heads.count <= states for b in blocks(sequences, call.hv, 2, states))


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor any operation makes, beside those given."""

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("run", [lambda c: run_vectorized(c, 64), lambda c: run_chunked(c, 16, 256)])
@pytest.mark.parametrize("strides", ["dense", "any"])
def test_no_tensor_grows_with_the_batch(run, strides):
    """No state per token, no padding to the longest, no copy of a whole input: blocks bound every temporary."""
    spec = BASE.but(lengths=(200, *(3,) * 40), padded=(), k=32, v=32, strides=strides)
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.empty_like(call.v)
    with LargestTensor(call.tensors().values()) as largest:
        run(call)
    assert 0 < largest.bytes <= 72 << 10
    assert call.q.numel() * call.q.element_size() > 72 << 10  # the smallest of the large inputs


def test_a_block_never_works_in_more_than_a_share_of_the_call():
    small = canonical_call(**make_inputs(BASE).kwargs)
    assert block_bytes(small, 64) == 64 << 10
    assert block_bytes(small, 1 << 20) == 2 << 20  # the floor
    large = canonical_call(**make_inputs(BASE.but(lengths=(1,) * 64, padded=(), k=128, v=128)).kwargs)
    held = sum(t.numel() * t.element_size() for t in large.tensors().values())
    assert 2 << 20 < block_bytes(large, 1 << 20) <= held / 5


def test_heads_of_a_block_name_their_key_heads():
    heads = Heads(first=4, count=4, first_key=2, keys=2)
    assert (heads.group, heads.values, heads.key_heads) == (2, slice(4, 8), slice(2, 4))
