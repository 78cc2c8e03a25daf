"""Batches taken apart by addresses: every launch is that of the calls on views, without a view being made."""

from __future__ import annotations

import gc
import struct
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from isokern.backends.composite import addressed, plans
from isokern.backends.composite.addressed import MOST_KINDS, MOST_PLANS, MOST_PREPARED
from isokern.backends.composite.backend import Composite
from isokern.backends.composite.runner import MOST_RUNS
from isokern.backends.composite.streams import SideStreams
from isokern.backends.launch import forks
from isokern.backends.launch.chain import Chain
from isokern.backends.launch.compiler import Layout
from isokern.backends.launch.image import Image
from isokern.backends.launch.launcher import Launcher
from isokern.backends.launch.recording import RecordingLibrary
from isokern.backends.torch_native.backends import TorchReference
from isokern.errors import BackendFailedError, ForkedProcessError, NotPreparedError
from isokern.registry.backend import Backend, Config, PinnableByLayout
from isokern.registry.core import Registry
from isokern.registry.decision import Accepted, RejectCode, Rejected
from isokern.registry.ops.fused_sigmoid_gating import hot
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.varlen.layout import SequenceLayout

OP = "fused_sigmoid_gating"
TWO = CaseSpec("two runs", (1, 1, 1, 20, 9), h=1, hv=2, k=8, v=16, as_layout=True)
CONFIG = Config.of(chunk=16, cut=0, long="chunks[chunk=16]", short="walks", streams=1, threshold=4)
BESIDE = Config.from_dict(CONFIG.to_dict() | {"streams": 2})
VECTORS = ("q", "k", "v", "out", "pool")


class Compiler:
    """A kernel that is given every tensor, and all that a layout follows from; perhaps a workspace."""

    def __init__(self, name, shares=False):
        self.name, self.shares, self.compiled, self.laid_out = name, shares, [], 0

    def layout(self, call):
        self.laid_out += 1
        given = [name for name in TENSORS if getattr(call, name) is not None]
        strides = [s for name in given for s in getattr(call, name).stride()]
        sizes = [getattr(call, name).element_size() for name in given]
        scalars = [call.scale, call.softplus_beta, call.use_qk_l2norm, call.state_layout == "kv"]
        numbers = [float(x) for x in (call.n, call.q.shape[1], *strides, *sizes, *scalars)]
        at = 8 * (1 + len(numbers))
        block = bytes(8) + struct.pack(f"={len(numbers)}d", *numbers) + bytes(8 * len(given))
        places = tuple((TENSORS.index(name), at + 8 * place) for place, name in enumerate(given))
        vectors = tuple(TENSORS.index(name) for name in VECTORS if name in given)
        return Layout(block, places, (call.n, 1, 1), vectors, key=None, scratch=0 if self.shares else None)

    def expected(self):
        return ()

    def errors(self):
        return (RuntimeError,)

    def image(self, variant, fresh=False):
        self.compiled.append(variant)
        return Image(f"{self.name} {'wide' if variant.wide else 'narrow'}".encode(), self.name, threads=32)


class Part(Backend):
    """Launches of planted kernels."""

    op = OP
    provenance = "cupy"
    tags = frozenset({"repeatable"})

    def __init__(self, name, driver, kernels, chunk=None, needs=640):
        self.name, self.driver, self.chunk, self.needs = name, driver, chunk, needs
        self.accuracy, self.priority = ("recurrent", 20) if chunk is None else ("chunked", 10)
        self.compilers = [Compiler(kernel, shares=chunk is not None) for kernel in kernels]
        self.accepts = lambda problem: True

    def check(self, problem):
        return Accepted() if self.accepts(problem) else Rejected(RejectCode.FEATURE, "not this one")

    def configs(self, problem):
        return (Config() if self.chunk is None else Config.of(chunk=self.chunk),)

    def bind(self, problem, config):
        made = [Launcher(self.name, problem, config, each, self.driver) for each in self.compilers]
        return made[0] if self.chunk is None else Chain(made, lambda call: self.needs * call.n)


class Made:
    """A composite of two such parts, and the library that records what they launch."""

    def __init__(self, library=None, streams=None, driver=None, short=None):
        self.library = library or RecordingLibrary()
        self.driver = driver or self.library.driver()
        self.short = short or Part("walks", self.driver, ["walk"])
        self.long = Part("chunks", self.driver, ["prepare", "scan"], chunk=16)
        self.composite = Composite(lambda: {part.name: part for part in (self.short, self.long)})
        if streams is not None:
            self.composite._streams = streams

    def bind(self, spec=TWO, config=CONFIG):
        return self.composite.bind(call_of(spec).problem(), config)

    def launched(self, run, *arguments):
        """What ``run`` launches: code, grid, stream and parameters, the workspace's address apart."""
        before = len(self.library.launches)
        run(*arguments)
        found = [(x.code, x.grid, x.stream, x.parameters[8:]) for x in self.library.launches[before:]]
        self.workspaces = [int.from_bytes(x.parameters[:8], "little") for x in self.library.launches[before:]]
        return found

    def op(self):
        own = Registry({}, load_plugins=False)
        own.register_op(SPEC)
        own.register_backend(self.composite)
        return own.get(OP)


def call_of(spec=TWO, seed=0):
    call = canonical_call(**make_inputs(spec, seed).kwargs)
    call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    return call


def tensors_of(call):
    return tuple(getattr(call, name) for name in TENSORS)


def off(tensor):
    """The same shape and strides, one element off alignment."""
    room = torch.zeros(1 + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True)) + 1)
    return room.to(tensor.dtype)[1:].as_strided(tensor.shape, tensor.stride(), 1)


# ---- what is launched

BATCHES = {
    "two runs": TWO,
    "eight runs": TWO.but(lengths=(1, 8) * 4),
    "more runs than are taken apart": TWO.but(lengths=(1, 8) * 5),
    "prompts first": TWO.but(lengths=(9, 20, 1, 1)),
    "short only": TWO.but(lengths=(1, 2, 3)),
    "long only": TWO.but(lengths=(20, 9, 5)),
    "empty sequences": TWO.but(lengths=(0, 1, 0, 12, 0, 1, 0)),
    "no token": TWO.but(lengths=(0, 0)),
    "rows beyond the last": TWO.but(extra_rows=3, padded=(1,)),
    "no pool": TWO.but(state_dtype=None),
    "other slots written": TWO.but(update="separate"),
    "nothing written": TWO.but(update="disabled"),
    "a tree": TWO.but(verify="tree"),
    "gates per channel": TWO.but(is_kda=True, state_layout="vk"),
    "strided rows": TWO.but(strides="rows"),
    "strided": TWO.but(strides="any", index_dtype="int64", cu_dtype="int64"),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_the_launches_are_those_of_calls_on_views(batch):
    made, call = Made(), call_of(BATCHES[batch])
    runner = made.bind()
    views = made.launched(runner._by_views, call)
    assert made.launched(runner, call) == views, "its first call"
    assert made.launched(runner, call) == views, "a repeated one"
    assert bool(views) is (batch != "no token")
    sides = {code.split()[0] for code, *_ in views}
    assert ({b"walk", b"scan"} <= sides) is (len(call.layout.spans(4)) in range(2, MOST_RUNS + 1))


def test_a_repeated_call_makes_no_view_and_prepares_nothing(monkeypatch):
    made, call = Made(), call_of()
    runner = made.bind()
    runner(call)
    compilers = (*made.short.compilers, *made.long.compilers)
    laid_out = [compiler.laid_out for compiler in compilers]
    monkeypatch.setattr(addressed, "call_of", None)
    monkeypatch.setattr(SequenceLayout, "runs", None)
    other = call_of(seed=1)
    runner(other.replace(layout=call.layout, cu_seqlens=call.cu_seqlens))
    assert [compiler.laid_out for compiler in compilers] == laid_out


@pytest.mark.parametrize(
    "lengths", [(1, 1, 1, 20, 9), (1, 1, 1, 19, 10), (1, 1, 2, 18, 10), (1, 1, 9, 1, 20), (20, 9, 1, 1, 1)]
)
def test_another_layout_of_the_profile_has_its_own_launches(lengths):
    made, first = Made(), call_of()
    runner = made.bind()
    pinned = runner.pin_by_layout(first)
    made.launched(pinned, tensors_of(first), first.layout)
    other = call_of(TWO.but(lengths=lengths), 1)
    assert other.layout.profile == first.layout.profile
    for call in (other, first, other):
        views = made.launched(runner._by_views, call)
        assert made.launched(pinned, tensors_of(call), call.layout) == views


def test_runs_of_the_same_sizes_share_their_launches_whatever_the_layout():
    made, first = Made(), call_of()
    runner = made.bind()
    runner(first)
    before = [compiler.laid_out for compiler in made.long.compilers]
    runner(call_of(TWO.but(lengths=(1, 1, 1, 9, 20))))
    assert [compiler.laid_out for compiler in made.long.compilers] == before


def test_runs_of_the_same_sizes_but_other_parts_share_nothing():
    """Three sequences of nine tokens: short ones, or with empty ones behind a long one."""
    made, first = Made(), call_of(TWO.but(lengths=(3, 3, 3, 20, 3)))
    runner = made.bind()
    other = call_of(TWO.but(lengths=(9, 0, 0, 1, 22)))
    for call in (first, other):
        assert made.launched(runner, call) == made.launched(runner._by_views, call)
    assert len(runner._kinds._recent) == 1


@pytest.mark.parametrize("name", [name for name in TENSORS if name not in ("cu_seqlens", "A_log", "dt_bias")])
def test_addresses_and_alignment_are_each_call_s_own(name):
    spec = TWO.but(update="separate", verify="tree")
    made, first = Made(), call_of(spec)
    runner = made.bind(spec)
    pinned = runner.pin_by_layout(first)
    changed = first.replace(**{name: off(getattr(first, name))})
    codes = []
    for call in (first, changed, first):
        views = made.launched(runner._by_views, call)
        assert made.launched(pinned, tensors_of(call), call.layout) == views
        codes.append({code.split()[1] for code, *_ in views})
    assert codes == [{b"wide"}, {b"narrow"} if name in VECTORS else {b"wide"}, {b"wide"}]


def test_one_run_alone_may_be_unaligned():
    """A run begins some rows behind the batch: with rows of 8 bytes every other one is aligned."""
    made, call = Made(), call_of(TWO.but(k=4, v=4, hv=1, lengths=(1, 20, 9, 1, 1)))
    runner = made.bind(TWO.but(k=4, v=4, hv=1))
    assert made.launched(runner, call) == made.launched(runner._by_views, call)
    codes = [x.code for x in made.library.launches[:4]]
    assert codes[0] == b"walk wide"
    assert codes[1] == b"prepare narrow"


CHANGES = {
    "a stride": lambda call: call.replace(q=torch.empty(*call.q.shape[:3], 16, dtype=call.q.dtype)[..., :8]),
    "a dtype": lambda call: call.replace(read_slots=call.read_slots.long()),
    "the scale": lambda call: call.replace(scale=0.5),
    "no pool": lambda call: call.replace(pool=None, read_slots=None),
    "nothing written": lambda call: call.replace(write_slots=None),
    "other slots written": lambda call: call.replace(write_slots=call.read_slots.long()),
    "states of each step": lambda call: call_of(TWO.but(verify="chain")),
    "more sequences": lambda call: call_of(TWO.but(lengths=(1, 1, 1, 1, 20, 9))),
    "more rows": lambda call: call_of(TWO.but(extra_rows=1)),
    "normalisation": lambda call: call.replace(use_qk_l2norm=not call.use_qk_l2norm),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_of_another_kind_is_prepared_anew(change):
    made, call = Made(), call_of()
    runner = made.bind()
    runner(call)
    other = CHANGES[change](call)
    before = made.short.compilers[0].laid_out
    for each in (other, call, other):
        assert made.launched(runner, each) == made.launched(runner._by_views, each)
    assert made.short.compilers[0].laid_out > before


def test_offsets_that_are_not_the_layout_s_are_no_ground_to_count_from():
    made, call = Made(), call_of()
    runner = made.bind()
    runner(call)
    copied = call.replace(cu_seqlens=call.cu_seqlens.clone())
    assert made.launched(runner, copied) == made.launched(runner._by_views, copied)
    assert runner.pin_by_layout(copied) is None


# ---- in the op


@pytest.mark.parametrize("spec", [TWO, TWO.but(update="separate", verify="tree"), TWO.but(is_kda=True)])
def test_the_op_s_calls_go_by_addresses_from_the_second_on(spec, monkeypatch):
    made = Made()
    op, kwargs = made.op(), make_inputs(spec).kwargs
    kwargs["out"] = torch.empty(kwargs["v"].shape, dtype=kwargs["q"].dtype)
    op(**kwargs, backend="composite")
    [entry] = op.entries.recent
    assert isinstance(entry.runner, PinnableByLayout)
    assert entry.pinned is None
    want = made.launched(entry.runner._by_views, canonical_call(**kwargs))
    monkeypatch.setattr(entry, "runner", None)
    assert made.launched(lambda: op(**kwargs, backend="composite")) == want
    assert len(want) == 3


def test_gates_given_flat_are_put_in_shape_first(monkeypatch):
    made = Made()
    op, kwargs = made.op(), make_inputs(TWO).kwargs
    kwargs |= {name: kwargs[name].flatten(0, 1) for name in ("a", "b")}
    op(**kwargs, backend="composite")
    [entry] = op.entries.recent
    given = []
    monkeypatch.setattr(entry, "laid", lambda tensors, layout: given.append((tensors, layout)))
    op(**kwargs, backend="composite")
    [(tensors, layout)] = given
    assert layout is kwargs["cu_seqlens"]
    assert [tensors[TENSORS.index(name)].dim() for name in ("a", "b")] == [3, 3]


def test_a_call_with_bare_offsets_goes_by_views():
    made = Made()
    op, kwargs = made.op(), make_inputs(TWO.but(as_layout=False)).kwargs
    for _ in range(2):
        assert len(made.launched(lambda: op(**kwargs, backend="composite"))) == 3
    assert op.entries.recent[0].laid is None


def test_another_layout_of_the_profile_is_the_same_entry_s():
    made = Made()
    op, kwargs = made.op(), make_inputs(TWO).kwargs
    for lengths in ((1, 1, 1, 20, 9), (1, 1, 9, 1, 20), (1, 1, 2, 18, 10)):
        layout = SequenceLayout.from_lengths(lengths)
        got = made.launched(lambda layout=layout: op(**kwargs | {"cu_seqlens": layout}, backend="composite"))
        assert len(got) == sum(2 if span.long else 1 for span in layout.spans(8))
    assert op.stats()["misses"] == 1


def test_a_part_that_is_not_launched_by_address_leaves_calls_to_views():
    reference = TorchReference()
    reference.name, reference.priority = "walks", 20
    made = Made(short=reference)
    runner, call = made.bind(), call_of()
    assert runner.pin_by_layout(call) is None
    op, kwargs = made.op(), make_inputs(TWO).kwargs
    for _ in range(2):
        assert [code for code, *_ in made.launched(lambda: op(**kwargs, backend="composite"))] == [
            b"prepare wide",
            b"scan wide",
        ]
    assert op.entries.recent[0].laid is None
    assert op.entries.recent[0].pinned is None


def test_a_layout_whose_run_goes_to_such_a_part_does_so_too():
    made, ran = Made(), []
    third = TorchReference()
    third.name = "third"
    inner = third.bind
    third.bind = lambda problem, config: lambda call: ran.append(call.layout.lengths) or inner(problem, config)(call)
    made.composite._given = lambda: {part.name: part for part in (made.short, made.long, third)}
    runner, first = made.bind(), call_of()
    pinned = runner.pin_by_layout(first)
    made.short.accepts = lambda problem: problem.profile.tokens != 8
    made.long.accepts = lambda problem: problem.profile.longest > 4
    other = call_of(TWO.but(lengths=(2, 3, 1, 17, 9)))
    for call, found in ((first, []), (other, [(2, 3, 1)])):
        ran.clear()
        made.launched(pinned, tensors_of(call), call.layout)
        assert ran == found
    assert len(made.workspaces) == 2, "the other part was launched"


# ---- captures


def test_a_capture_compiles_nothing():
    made, call = Made(), call_of()
    runner = made.bind()
    made.library.capturing = True
    with pytest.raises(NotPreparedError):
        runner(call)
    assert made.library.launches == []
    made.library.capturing = False
    runner.pin(call)
    assert made.library.launches == []
    made.library.capturing = True
    assert made.launched(runner, call) == made.launched(runner._by_views, call)


def test_preparing_a_call_compiles_for_its_own_addresses():
    made, call = Made(), call_of()
    runner = made.bind()
    runner(call)
    unaligned = call.replace(q=off(call.q))
    assert runner.pin(unaligned) is None
    made.library.capturing = True
    assert {code.split()[1] for code, *_ in made.launched(runner, unaligned)} == {b"narrow"}


def test_a_plan_made_in_a_capture_is_that_capture_s_own():
    """Its offsets may be; one that was there before serves."""
    made, call = Made(), call_of()
    runner = made.bind()
    runner(call)
    [kind] = runner._kinds._recent
    known = kind._plans
    made.library.capturing = True
    runner(call)
    assert kind._plans is known
    runner(call_of())  # another layout of these lengths
    assert kind._plans is known
    made.library.capturing = False
    runner(call_of())
    assert len(kind._plans) == 2


def test_the_offsets_of_a_capture_live_as_long_as_their_launches(monkeypatch):
    made, call = Made(), call_of()
    runner = made.bind()
    runner(call)
    made.library.capturing = True
    runs, alive = SequenceLayout.runs, []

    def not_kept(self, threshold):
        found = runs(SequenceLayout(self.offsets, self.cu_seqlens), threshold)
        alive.append(weakref.ref(found[1].layout.cu_seqlens))
        return found

    launch = made.library.launches
    monkeypatch.setattr(SequenceLayout, "runs", not_kept)

    class Watching(list):
        def append(self, item):
            assert alive[-1]() is not None
            super().append(item)

    made.library.launches = Watching(launch)
    runner(call_of())
    assert len(made.library.launches) == len(launch) + 3
    gc.collect()
    assert alive[-1]() is None


def test_a_capture_is_another_entry_of_the_op(monkeypatch):
    made = Made()
    op, kwargs = made.op(), make_inputs(TWO).kwargs
    op(**kwargs, backend="composite")
    [entry] = op.entries.recent
    entry.on_cuda = True  # as far as the hot path can tell
    monkeypatch.setattr(hot, "is_current_stream_capturing", lambda: True)
    op(**kwargs, backend="composite")
    assert op.stats()["misses"] == 2


# ---- what is kept


def test_nothing_keeps_a_tensor_or_a_layout_alive():
    made = Made()
    runner, call = made.bind(), call_of()
    runner(call)
    pinned = runner.pin_by_layout(call)
    kept = [weakref.ref(tensor) for tensor in call.tensors().values()] + [weakref.ref(call.layout)]
    del call
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    assert pinned is not None


def test_what_is_remembered_is_bounded():
    made = Made()
    runner, call = made.bind(), call_of(TWO.but(extra_rows=MOST_PREPARED))
    pinned = runner.pin_by_layout(call)
    for more in range(MOST_PREPARED):
        layout = SequenceLayout.from_lengths((1, 1, 1 + more % 3, 9 + more, 5))
        pinned(tensors_of(call), layout)
        kind = pinned.__self__
        assert len(kind._plans) <= MOST_PLANS
        assert len(runner._kinds._remembered) <= MOST_PREPARED
    for rows in range(2 * MOST_KINDS):
        runner(call_of(TWO.but(extra_rows=rows)))
    assert len(runner._kinds._recent) == MOST_KINDS
    assert len(runner._kinds._remembered) == MOST_PREPARED


# ---- threads, streams, failures


def test_threads_share_no_arguments():
    mine, library = threading.local(), RecordingLibrary()
    made = Made(library, driver=replace(library.driver(), stream=lambda device: mine.stream))
    runner = made.bind()
    first = call_of()
    pinned, start = runner.pin_by_layout(first), threading.Barrier(4)

    def serve(stream, call):
        mine.stream = stream
        start.wait()
        for _ in range(200):
            pinned(tensors_of(call), call.layout)

    calls = {7 + i: call_of(TWO.but(lengths=((1, 1, 1, 20, 9), (1, 1, 9, 1, 20))[i % 2]), i) for i in range(4)}
    threads = [threading.Thread(target=serve, args=item) for item in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {(x.stream, x.code, x.parameters[8:]) for x in library.launches}
    library.launches.clear()
    for stream, call in calls.items():
        mine.stream = stream
        runner._by_views(call)
    assert found == {(x.stream, x.code, x.parameters[8:]) for x in library.launches}


def test_runs_on_one_stream_share_a_workspace_as_large_as_the_largest_needs(monkeypatch):
    asked, empty = [], torch.empty
    made, call = Made(), call_of(TWO.but(lengths=(20, 9, 20, 1, 9, 1)))
    runner = made.bind()
    runner(call)
    monkeypatch.setattr(plans.torch, "empty", lambda size, **kw: asked.append(empty(size, **kw)) or asked[-1])
    codes = [code for code, *_ in made.launched(runner, call)]
    assert [tensor.numel() for tensor in asked] == [3 * 640]
    address = asked[0].data_ptr()
    assert made.workspaces == [0 if code == b"walk wide" else address for code in codes]


def test_a_forked_child_is_told(monkeypatch):
    made, call = Made(), call_of()
    runner = made.bind()
    runner(call)
    monkeypatch.setattr(forks.process, "forked", True)
    with pytest.raises(ForkedProcessError):
        runner(call)


def test_a_launch_that_fails_says_so():
    made, call = Made(), call_of()
    runner = made.bind()
    runner(call)
    made.library.codes["cuLaunchKernelEx"] = 700
    with pytest.raises(BackendFailedError, match="launch"):
        runner(call)


class Handles:
    """torch.cuda's streams and events, of which there is nothing but handles."""

    def __init__(self):
        self.made, self.local = [], threading.local()

    def _handle(self):
        self.made.append(len(self.made) + 100)
        return self.made[-1]

    def Stream(self, device, priority=0):
        assert priority < 0
        return type("Stream", (), {"cuda_stream": self._handle()})()

    def Event(self):
        handle = self._handle

        class Event:
            cuda_event = 0

            def record(self, stream):
                self.cuda_event = self.cuda_event or handle()

        return Event()

    def current_stream(self, device):
        return None


class Streams(RecordingLibrary):
    """Notes the order of events and launches, by stream."""

    def __init__(self):
        super().__init__()
        self.log = []

    def cuEventRecord(self, event, stream):
        self.log.append(("record", event.value, stream.value or 0))
        return self._code("cuEventRecord")

    def cuStreamWaitEvent(self, stream, event, flags):
        assert flags == 0
        self.log.append(("wait", event.value, stream.value or 0))
        return self._code("cuStreamWaitEvent")

    def cuLaunchKernelEx(self, *arguments):
        code = super().cuLaunchKernelEx(*arguments)
        if not code:
            self.log.append((self.launches[-1].code.split()[0].decode(), self.launches[-1].stream))
        return code


def beside():
    library = Streams()
    made = Made(library, streams=SideStreams(Handles()))
    runner, call = made.bind(config=BESIDE), call_of()
    runner.pin(call)
    library.stream = 7
    return made, library, runner, call


def test_with_two_streams_the_long_part_leaves_the_current_one_and_comes_back():
    _, library, runner, call = beside()
    for _ in range(2):
        library.log.clear()
        runner(call)
        side, begin, end = 100, 101, 102
        assert library.log == [
            ("record", begin, 7),
            ("wait", begin, side),
            ("prepare", side),
            ("scan", side),
            ("walk", 7),
            ("record", end, side),
            ("wait", end, 7),
        ]


def test_on_two_streams_the_launches_are_those_of_one_in_the_same_places():
    made, _, runner, call = beside()
    alone = made.bind()
    of_one = {(code, parameters) for code, _, _, parameters in made.launched(alone, call)}
    assert {(code, parameters) for code, _, _, parameters in made.launched(runner, call)} == of_one


def test_a_batch_of_one_side_stays_on_the_current_stream():
    _, library, runner, _ = beside()
    library.log.clear()
    runner(call_of(TWO.but(lengths=(1, 1, 2))))
    assert library.log == [("walk", 7)]


def test_each_thread_has_a_side_stream_of_its_own():
    _, library, runner, call = beside()
    runner(call)
    thread = threading.Thread(target=runner, args=(call,))
    thread.start()
    thread.join()
    sides = {stream for kernel, *_, stream in library.log if kernel == "scan"}
    assert len(sides) == 2


def test_events_are_recorded_on_the_tensors_device():
    _, library, runner, call = beside()
    record, devices = library.cuEventRecord, []
    library.cuEventRecord = lambda *a: devices.append(library.device) or record(*a)
    library.device = 3
    runner(call)  # tensors of a CPU: device None
    assert devices == [None, None]
    assert library.device == 3, "the caller's device is current again"


@pytest.mark.parametrize("failing", ["launch", "record"])
def test_the_streams_come_together_again_where_something_fails(failing):
    _, library, runner, call = beside()
    runner(call)
    library.log.clear()
    if failing == "launch":
        library.codes["cuLaunchKernelEx"] = 700
        with pytest.raises(BackendFailedError):
            runner(call)
        assert [entry[0] for entry in library.log] == ["record", "wait", "record", "wait"]
    else:
        library.codes["cuEventRecord"] = 400
        with pytest.raises(RuntimeError, match="400"):
            runner(call)
        assert [entry[0] for entry in library.log] == ["record"], "nothing is launched that does not wait"


def test_memory_of_both_streams_is_held_until_the_side_stream_has_come_back(monkeypatch):
    """And they work in different places of it."""
    library = Streams()
    short = Part("walks", library.driver(), ["walk", "walk on"], chunk=16, needs=100)
    made = Made(library, streams=SideStreams(Handles()), short=short)
    runner, call = made.bind(config=Config.from_dict(BESIDE.to_dict() | {"short": "walks[chunk=16]"})), call_of()
    runner(call)
    empty, alive, at_the_end = torch.empty, [], []

    def noted(size, **kw):
        memory = empty(size, **kw)
        alive.append((weakref.ref(memory), memory.data_ptr(), size))
        return memory

    wait = library.cuStreamWaitEvent
    monkeypatch.setattr(plans.torch, "empty", noted)
    monkeypatch.setattr(
        library,
        "cuStreamWaitEvent",
        lambda *a: at_the_end.append([ref() is not None for ref, *_ in alive]) or wait(*a),
    )
    made.launched(runner, call)
    assert at_the_end == [[True], [True]]
    [(ref, base, size)] = alive
    assert ref() is None
    long_at, long_again, short_at, short_again = made.workspaces
    assert long_at == long_again == base
    assert short_at == short_again == base + 1536, "behind the 2 * 640 bytes of the long part, aligned"
    assert size == 1536 + 3 * 100


def test_memory_of_a_kernel_s_own_is_held_as_long():
    library, held = Streams(), []

    def launch(addresses, stream, workspace):
        memory = torch.empty(64)
        held.append((stream, weakref.ref(memory)))
        return memory

    group = (lambda given: given, None, (launch, launch), False)
    sides = {True: [group], False: [group]}
    run = plans.two_streams(sides, {True: 0, False: 0}, library.driver(), torch.device("cpu"), SideStreams(Handles()))
    wait, seen = library.cuStreamWaitEvent, []
    library.cuStreamWaitEvent = lambda *a: seen.append([ref() is not None for _, ref in held]) or wait(*a)
    run([1, 2])
    assert [stream for stream, _ in held] == [100, 100, 0, 0]
    assert seen == [[], [True] * 4]
    assert not any(ref() for _, ref in held)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA has no such streams")
def test_torch_s_streams_and_events_have_handles():
    assert hasattr(torch.cuda.Stream, "cuda_stream")
    assert hasattr(torch.cuda.Event, "cuda_event")
