"""Chains of kernels: the same tensors, one workspace per call, in order."""

import pytest
import torch

from isokern.backends.cupy_chunked.arguments import (
    CHUNK,
    RECORDS_AT,
    aligned,
    crossing_bytes,
    record_bytes,
    slots,
    template,
    workspace,
)
from isokern.backends.launch.chain import Chain
from isokern.backends.launch.compiler import Layout, Variant
from isokern.backends.launch.image import Image
from isokern.backends.launch.launcher import Launcher
from isokern.backends.launch.recording import RecordingLibrary
from isokern.errors import BackendFailedError
from isokern.registry.backend import Config, Pinnable
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

SPEC = CaseSpec("prompt", (70, 3), k=8, v=8)
PROBLEM = describe(SPEC, "cuda", 90)
Q, OUT = TENSORS.index("q"), TENSORS.index("out")


def call_of(spec=SPEC, seed=0):
    call = canonical_call(**make_inputs(spec, seed).kwargs)
    call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    return call


class Compiler:
    """A tensor's address, and the workspace's behind it."""

    def __init__(self, name, tensor):
        self.name, self.tensor = name, tensor

    def layout(self, call):
        return Layout(bytes(16), ((self.tensor, 0),), (call.n, 1, 1), scratch=8)

    def expected(self):
        return ()

    def errors(self):
        return (RuntimeError,)

    def image(self, variant, fresh=False):
        assert variant == Variant(None, wide=True)
        return Image(self.name.encode(), self.name, threads=32)


def made(bytes_needed=lambda call: 640 * call.n):
    library = RecordingLibrary()
    launchers = [
        Launcher("planted", PROBLEM, Config(), Compiler(name, tensor), library.driver())
        for name, tensor in (("first", Q), ("second", OUT))
    ]
    return Chain(launchers, bytes_needed), library


def words(launch):
    return list(memoryview(launch.parameters).cast("q"))


def test_kernels_follow_one_another_over_one_workspace():
    chain, library = made()
    call = call_of()
    assert chain(call) is call.out
    assert [launch.code for launch in library.launches] == [b"first", b"second"]
    (q, first), (out, second) = map(words, library.launches)
    assert (q, out) == (call.q.data_ptr(), call.out.data_ptr())
    assert first == second != 0
    assert library.launches[0].stream == library.launches[1].stream


def test_a_pinned_call_passes_the_tensors_it_is_given():
    chain, library = made()
    assert isinstance(chain, Pinnable)
    pinned = chain.pin(call_of())
    assert library.launches == [], "pinning runs nothing"
    other = call_of(seed=1)
    pinned(tuple(getattr(other, name) for name in TENSORS))
    assert [words(launch)[0] for launch in library.launches] == [other.q.data_ptr(), other.out.data_ptr()]


def test_kernels_over_the_same_tensors_are_one_step():
    library = RecordingLibrary()

    def steps_of(*tensors):
        launchers = [Launcher("planted", PROBLEM, Config(), Compiler(str(t), t), library.driver()) for t in tensors]
        prepared = Chain(launchers, lambda call: 64).prepared(call_of())
        assert prepared.workspace == 64
        return [(step.order, len(step.launches)) for step in prepared.steps]

    assert steps_of(Q, Q, OUT) == [((Q,), 2), ((OUT,), 1)]
    assert steps_of(Q, OUT, Q) == [((Q,), 1), ((OUT,), 1), ((Q,), 1)]


def test_the_workspace_is_as_large_as_the_call_needs():
    asked = []
    chain, _ = made(lambda call: asked.append(call.n) or 64)
    chain(call_of())
    chain(call_of(SPEC.but(lengths=(1, 2, 3))))
    assert asked == [2, 3]


def test_an_output_that_is_not_given_is_allocated():
    chain, library = made()
    call = call_of().replace(out=None)
    out = chain(call)
    assert (out.shape, out.dtype) == (call.v.shape, call.q.dtype)
    assert words(library.launches[1])[0] == out.data_ptr()


def test_a_call_without_sequences_launches_nothing():
    chain, library = made()
    chain(call_of(SPEC.but(lengths=())))
    assert library.launches == []


def test_a_failing_launch_ends_the_chain():
    chain, library = made()
    library.codes["cuLaunchKernelEx"] = 700
    with pytest.raises(BackendFailedError, match="launch"):
        chain(call_of())
    assert len(library.launches) <= 1


@pytest.mark.parametrize(
    "lengths", [(1,), (64,), (65,), (0, 0, 0), (63, 1, 64, 128, 0, 65), (1,) * 50 + (200,), (130, 0)]
)
def test_there_is_a_slot_for_every_chunk_and_no_two_meet(lengths):
    """The numbering that ``Sequence`` in chunks.cuh uses: first token / 64 + sequence."""
    call = call_of(SPEC.but(lengths=lengths, padded=()))
    taken, first = [], 0
    for n, length in enumerate(lengths):
        taken += [first // CHUNK + n + i for i in range(-(-length // CHUNK))]
        first += length
    assert len(set(taken)) == len(taken)
    assert max(taken, default=-1) < slots(call)
    assert workspace(call, 3) == slots(call) * call.hv * record_bytes(3)


@pytest.mark.parametrize(
    "lengths", [(65,), (64, 64), (63, 66, 64, 129, 0, 65, 1), (1,) * 50 + (200,), (130, 0, 130, 130, 65, 65)]
)
@pytest.mark.parametrize("span", [64, 128])
def test_there_is_a_place_for_every_segment_of_a_sequence_that_is_cut(lengths, span):
    """``first_segment`` and ``first_crossing`` in chunks.cuh: first / span + sequence, and 2 first / span."""
    call = call_of(SPEC.but(lengths=lengths, padded=()))
    segments, crossings, first = [], [], 0
    for n, length in enumerate(lengths):
        count = -(-length // span)
        segments += [first // span + n + i for i in range(count)]
        crossings += [2 * first // span + i for i in range(count)] if count > 1 else []
        first += length
    assert len(set(segments)) == len(segments)
    assert max(segments) < slots(call, span)
    assert len(set(crossings)) == len(crossings)
    room = (workspace(call, 1, span) - workspace(call, 1)) // call.hv // crossing_bytes(call.key_dim, call.value_dim)
    assert max(crossings, default=-1) < room


def test_slots_of_equal_lengths():
    call = call_of(SPEC.but(lengths=(70, 70), varlen=False))
    assert slots(call) == slots(call, 64) == 4
    assert slots(call, 128) == 2
    assert workspace(call, 1, 64) == workspace(call, 1) + 4 * call.hv * crossing_bytes(8, 8)


def test_every_address_has_its_place_in_front():
    call = call_of()
    block, places = template(call)
    assert sorted(at for _, at in places) == [8 * i for i in range(12)]
    assert RECORDS_AT == 8 * 12
    assert not any(block[: RECORDS_AT + 8])


def test_strides_decide_about_vectors():
    assert aligned(call_of())
    assert not aligned(call_of(SPEC.but(k=12)))
    assert not aligned(call_of(SPEC.but(strides="any")))
    assert not aligned(call_of(SPEC.but(k=8, v=8)).replace(q=torch.empty(1, 73, 2, 12, dtype=torch.bfloat16)[..., :8]))
    assert aligned(call_of(SPEC.but(state_layout="kv", strides="dense")))
