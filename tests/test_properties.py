"""Properties over made-up batches: every backend stays within the error bound and writes only what it was given."""

from __future__ import annotations

import itertools
from functools import lru_cache

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from isokern import registry
from isokern.registry.conformance.check import Declined
from isokern.registry.conformance.subject import Subject
from isokern.registry.ops.fused_sigmoid_gating.case import DISTRIBUTIONS, CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.checks.trial import Trial
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.memory import overlaps_itself, share_memory
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate_values import check_values

OP = "fused_sigmoid_gating"
BUILTIN_ON_CPU = ("torch_reference", "torch_vectorized", "torch_chunked", "numba_cpu", "composite")
FLOATS = ("float32", "bfloat16", "float16")
INTS = ("int32", "int64")

SETTINGS = settings(derandomize=True, deadline=None, database=None)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are small: handing them to threads costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache
def _subject(name: str) -> Subject:
    return Subject(registry.backends(OP)[name])


@st.composite
def cases(draw: st.DrawFn) -> CaseSpec:
    """Any call the op accepts, small."""
    varlen = draw(st.booleans())
    if varlen:
        lengths = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 3, 5, 18)), max_size=5)))
    else:
        lengths = (draw(st.sampled_from((0, 1, 4))),) * draw(st.integers(0, 3))
    which = st.sets(st.sampled_from(range(len(lengths)))) if lengths else st.just(set())
    h = draw(st.integers(1, 3))
    is_kda, l2norm = draw(st.booleans()), draw(st.booleans())
    state_dtype = draw(st.sampled_from((None, *FLOATS)))
    updates = ("none",) if state_dtype is None else ("in_place", "separate", "disabled")
    return CaseSpec(
        "drawn",
        lengths,
        h=h,
        hv=h * draw(st.integers(1, 3)),
        # Without the norm the generator keeps beta * |k|**2 below 2 on average only, which takes a few channels.
        k=draw(st.sampled_from((1, 3, 16, 24) if l2norm else (16, 24))),
        v=draw(st.sampled_from((1, 5, 16, 33))),
        varlen=varlen,
        distribution=draw(st.sampled_from(DISTRIBUTIONS)),
        io_dtype=draw(st.sampled_from(FLOATS)),
        gate_dtype=draw(st.sampled_from(FLOATS)),
        state_dtype=state_dtype,
        state_layout=draw(st.sampled_from(("kv", "vk"))),
        is_kda=is_kda,
        lower_bound=draw(st.sampled_from((None, -5.0))) if is_kda else None,
        l2norm=l2norm,
        neg_eigval=draw(st.booleans()),
        scale=draw(st.sampled_from((None, 0.3))),
        softplus_threshold=draw(st.sampled_from((20.0, 2.0))),
        update=draw(st.sampled_from(updates)),
        verify=draw(st.sampled_from(("none", "none", "chain", "tree"))),
        intermediate_dtype=draw(st.sampled_from(FLOATS)),
        index_dtype=draw(st.sampled_from(INTS)),
        cu_dtype=draw(st.sampled_from(INTS)),
        padded=tuple(sorted(draw(which))),
        fresh=tuple(sorted(draw(which))),
        extra_slots=draw(st.integers(0, 2)),
        extra_rows=draw(st.integers(0, 2)) if varlen else 0,
        strides=draw(st.sampled_from(("dense", "rows", "any"))),
        as_layout=varlen and draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def test_every_builtin_cpu_backend_is_here():
    assert set(BUILTIN_ON_CPU) <= set(registry.backends(OP))


@pytest.mark.parametrize("name", BUILTIN_ON_CPU)
def test_within_the_bound_and_nothing_else_written(name: str):
    ran: list[CaseSpec] = []

    @given(cases())
    @settings(SETTINGS, max_examples=100)
    def examine(spec: CaseSpec) -> None:
        subject = _subject(name)
        trial = Trial.of(spec)
        check_values(trial.call)
        try:
            chunk = subject.chunk(trial.call)
            ref = reference(trial.call, chunk=chunk)
            trial.run(subject)
        except Declined as declined:
            event(str(declined))
            return
        ran.append(spec)
        judgement = judge(trial.call, trial.out, ref)
        assert judgement.ok, judgement.faults
        trial.check_untouched()

    examine()
    assert len(ran) >= 20, f"{name} declined all but {len(ran)} cases"


# ---------------------------------------------------------------------------------------------------------------
# Memory


@st.composite
def views(draw: st.DrawFn, storage: torch.Tensor) -> torch.Tensor:
    """A view of ``storage`` with any strides, 0 included."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    strides = draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    return storage.as_strided(sizes, strides, draw(st.integers(0, 9)))


def _addresses(t: torch.Tensor) -> list[int]:
    indices = itertools.product(*(range(n) for n in t.shape))
    return [t.storage_offset() + sum(i * s for i, s in zip(index, t.stride(), strict=True)) for index in indices]


STORAGE = torch.zeros(128)


@given(views(STORAGE))
@settings(SETTINGS, max_examples=300)
def test_a_view_that_overlaps_itself_is_found(view):
    addresses = _addresses(view)
    if len(set(addresses)) < len(addresses):
        assert overlaps_itself(view)
    elif sorted(addresses) == list(range(min(addresses, default=0), max(addresses, default=-1) + 1)):
        assert not overlaps_itself(view), "a permutation of packed memory is no overlap"


@given(views(STORAGE), views(STORAGE))
@settings(SETTINGS, max_examples=300)
def test_views_share_memory_exactly_when_an_address_is_in_both(x, y):
    assert share_memory(x, y) == bool(set(_addresses(x)) & set(_addresses(y)))


def test_memory_is_compared_in_bytes():
    storage = torch.zeros(8)
    halves = storage.view(torch.float16)
    assert share_memory(storage[2:3], halves[5:6])
    assert not share_memory(storage[2:3], halves[6:8])
    assert not share_memory(storage, torch.zeros(8))
