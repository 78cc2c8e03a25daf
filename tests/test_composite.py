"""The composite backend: what it declines, what it offers, where each sequence runs, and that nothing is made twice."""

from __future__ import annotations

import re
import threading
from collections import deque

import pytest
import torch

from isokern import registry
from isokern.autotune.candidates import admit
from isokern.backends.composite import bound
from isokern.backends.composite.backend import Composite, CompositeBf16
from isokern.backends.composite.bound import common, covers
from isokern.backends.composite.part import Part
from isokern.backends.composite.runner import MOST_BOUND, MOST_RUNS
from isokern.backends.composite.space import MOST_CONFIGS
from isokern.backends.composite.streams import SideStreams
from isokern.backends.torch_native.backends import TorchReference
from isokern.cache import CandidateRecord, Entry, Layer, Store
from isokern.errors import ForkedProcessError, NoBackendError
from isokern.registry.backend import Backend, Chunked, Config
from isokern.registry.conformance.check import PredicateFault
from isokern.registry.conformance.gate import gate
from isokern.registry.conformance.subject import chunk_of
from isokern.registry.core import Registry
from isokern.registry.decision import Accepted, RejectCode, Rejected, Rule
from isokern.registry.forks import Forks
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.checks.trial import Trial, bits
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.selection import verdicts
from isokern.registry.varlen.profile import VarlenProfile

OP = "fused_sigmoid_gating"
MIXED = CaseSpec("63x1+1x2048", (1,) * 63 + (2048,), h=16, hv=32, k=128, v=128, as_layout=True)
SMALL = CaseSpec("small", (1, 1, 20, 0, 9, 1, 0), h=1, hv=2, k=8, v=12, as_layout=True)
HEAVY = SMALL.but(name="heavy", lengths=(1,) * 7 + (40,))


class Noting(Backend):
    """The reference under another name; notes the calls it gets."""

    op = OP
    provenance = "numba"
    tags = frozenset({"repeatable"})

    def __init__(self, name, rank=10, chunks=(), accepts=lambda problem: True, cuts=None, rounds=False):
        self.name, self.priority, self.chunks, self.accepts = name, rank, chunks, accepts
        self.accuracy = "rounded" if rounds else "chunked" if chunks else "recurrent"
        self.cuts, self.cuts_of = cuts is not None, cuts
        self.bound, self.calls, self.pinned = [], [], []

    def check(self, problem):
        return Accepted() if self.accepts(problem) else Rejected(RejectCode.FEATURE, "not this one")

    def configs(self, problem):
        if self.cuts:
            return tuple(Config.of(chunk=c, cut=cut) for c in self.chunks for cut in self.cuts_of(problem))
        return tuple(Config.of(chunk=c) for c in self.chunks) or (Config(),)

    def bind(self, problem, config):
        self.bound.append((problem, config))
        inner = TorchReference().bind(problem, config)
        noting = self

        class Run:
            def __call__(self, call):
                noting.calls.append(call)
                return inner(call)

            def pin(self, call):
                noting.pinned.append(call)

        return Run()


def made_of(*parts: Backend, kind: type[Composite] = Composite) -> Composite:
    return kind(lambda: {part.name: part for part in parts})


def pair(**options) -> tuple[Noting, Noting, Composite]:
    short, long = Noting("walks", 20), Noting("chunks", 10, chunks=(16, 32, 8), **options)
    return short, long, made_of(short, long)


def config_of(short="walks", long="chunks[chunk=16]", threshold=4, streams=1, chunk=16, cut=0) -> Config:
    return Config.of(chunk=chunk, cut=cut, long=long, short=short, streams=streams, threshold=threshold)


def lengths_of(calls) -> list[tuple[int, ...]]:
    return [call.layout.lengths for call in calls]


# ---- what it declines


@pytest.mark.parametrize(
    ("problem", "code", "reason"),
    [
        (describe(MIXED.but(varlen=False, lengths=(4, 4)), "cpu"), RejectCode.FEATURE, "equal length"),
        (describe(MIXED.but(as_layout=False), "cuda", 90), RejectCode.FEATURE, "SequenceLayout"),
        (describe(MIXED.but(lengths=(1,) * 64), "cpu"), RejectCode.SHAPE, "decode: nothing to split"),
        (describe(MIXED.but(lengths=(64, 60, 64)), "cpu"), RejectCode.SHAPE, "uniform: nothing to split"),
        (describe(MIXED.but(lengths=(64,)), "cpu"), RejectCode.SHAPE, "nothing to split"),
        (describe(MIXED.but(lengths=()), "cpu"), RejectCode.SHAPE, "nothing to split"),
    ],
)
def test_it_declines_with_a_reason(problem, code, reason):
    verdict = Composite().check(problem)
    assert isinstance(verdict, Rejected)
    assert verdict.code is code
    assert reason in verdict.reason


def test_it_declines_inputs_that_require_grad():
    call = Trial.of(SMALL).call
    call.q.requires_grad_()
    verdict = Composite().check(call.problem())
    assert isinstance(verdict, Rejected)
    assert verdict.code is RejectCode.GRAD


@pytest.mark.parametrize(("side", "longest"), [("short", 1), ("long", 2048)])
def test_it_declines_a_batch_with_a_part_that_nobody_runs(side, longest):
    only = Noting("only", accepts=lambda problem: problem.profile.longest != longest)
    verdict = made_of(only).check(describe(MIXED, "cpu"))
    assert not verdict
    assert f"no other backend runs its {side} sequences" in verdict.reason


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_it_accepts_unequal_lengths_that_the_host_knows(device, mode):
    assert Composite().check(describe(MIXED, device, 90, mode))


# ---- what it offers


def test_the_default_is_the_first_backend_of_each_part_a_chunked_one_for_the_long():
    _, _, both = pair()
    [first, *rest] = both.configs(describe(MIXED, "cpu"))
    assert first == config_of(threshold=32)
    assert len(rest) < MOST_CONFIGS
    assert len({first, *rest}) == 1 + len(rest)


def test_on_a_gpu_its_parts_run_one_after_another_or_beside_each_other():
    _, _, both = pair()
    one, two, *_ = both.configs(describe(MIXED, "cuda", 90))
    assert (one["streams"], two["streams"]) == (1, 2)
    assert Config.from_dict(two.to_dict() | {"streams": 1}) == one
    # In a CUDA graph a second stream costs nothing.
    assert both.configs(describe(MIXED, "cuda", 90, "graph"))[:2] == (two, one)
    assert [c["streams"] for c in both.configs(describe(MIXED, "cpu"))][:1] == [1]


def test_without_a_chunked_backend_the_first_of_each_part():
    [first, *_] = made_of(Noting("walks", 20), Noting("runs", 30)).configs(describe(MIXED, "cpu"))
    assert (first["short"], first["long"], first["chunk"]) == ("runs", "runs", 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("lengths", [MIXED.lengths, (1,) * 48 + (256,) * 16, (9, 0, 20, 1, 5), (3, 9)])
def test_every_config_is_a_few_scalars_that_name_registered_backends(device, lengths):
    problem = describe(MIXED.but(lengths=lengths), device, 90)
    offered = Composite().configs(problem)
    assert 1 < len(offered) <= MOST_CONFIGS
    known = registry.backends(OP)
    for config in offered:
        parts = [Part.parse(config[side]) for side in ("short", "long")]
        assert {part.backend for part in parts} <= set(known) - {"composite", "composite_bf16"}
        chunks = [int(found[1]) if (found := re.search(r"\bchunk=(\d+)", part.label)) else 0 for part in parts]
        assert config["chunk"] == max(chunks), "the bound is that of the longest chunk"
        cut = re.search(r"\bcut=(\d+)", parts[1].label)
        assert config["cut"] == (int(cut[1]) if cut else 0)
        assert 1 <= config["threshold"] < problem.profile.longest
        assert config["streams"] == 1 or device == "cuda"
        assert Config.from_dict(config.to_dict()) == config
    assert offered == Composite().configs(problem)


def test_parts_are_read_as_they_are_written():
    for part in (Part("a"), Part("a", "x=1,y=2")):
        assert Part.parse(str(part)) == part


def test_a_backend_that_is_not_repeatable_or_a_composite_is_no_part():
    loose = Noting("loose", 99)
    loose.tags = frozenset()
    other = made_of(Noting("inner"))
    both = Composite(lambda: {"loose": loose, "composite": other, "walks": Noting("walks")})
    assert set(both.parts()) == {"loose", "walks"}
    assert {config["short"] for config in both.configs(describe(MIXED, "cpu"))} == {"walks"}


def test_its_parts_are_what_every_process_finds():
    stranger = Noting("stranger")
    registry.register_backend(stranger)
    try:
        assert "stranger" not in Composite().parts()
        assert {"numba_cpu", "torch_chunked"} <= set(Composite().parts())
    finally:
        registry.unregister_backend(OP, "stranger")


def test_what_other_libraries_are_there_changes_nothing():
    """Else a choice tuned where one of them is registered would be another one's where it is not."""
    adapters = {n: b for n, b in registry.backends(OP).items() if b.provenance == "external"}
    assert adapters
    before = {both.name: (set(both.parts()), both.fingerprint()) for both in (Composite(), CompositeBf16())}
    try:
        for name in adapters:
            registry.unregister_backend(OP, name)
        assert {both.name: (set(both.parts()), both.fingerprint()) for both in (Composite(), CompositeBf16())} == before
    finally:
        for adapter in adapters.values():
            registry.register_backend(adapter)


def test_its_fingerprint_changes_with_a_part_s():
    part = Noting("walks")
    both = made_of(part)
    before = both.fingerprint()
    assert both.fingerprint() == before
    part.toolchain = lambda: {"compiler": "2"}
    assert both.fingerprint() != before


# ---- its place in the heuristic order


def on_gpu(chunked_rank: int) -> Composite:
    return made_of(Noting("walks", 70), Noting("chunks", chunked_rank, chunks=(64,)))


def rank_on(device: str, spec: CaseSpec, chunked_rank: int, mode: str = "eager") -> tuple[int, int]:
    both = on_gpu(chunked_rank)
    long_first = both.parts()["chunks"]
    long_first.rank = lambda problem: chunked_rank if problem.profile.longest > 64 else 0
    problem = describe(spec, device, 90, mode)
    return both.rank(problem), max(b.rank(problem) for b in both.parts().values())


@pytest.mark.parametrize("of_torch", ["walks", "chunks"])
def test_a_part_of_torch_never_runs_beside_the_other(of_torch):
    """It gives a slot that nobody stores its value back: by then the other part may have stored there."""
    _, _, both = pair()
    both.parts()[of_torch].provenance = "torch"
    offered = both.configs(describe(MIXED, "cuda", 90, "graph"))
    beside = {config["streams"] for config in offered if of_torch in config["short"] + config["long"]}
    assert beside == {1}
    stored = both.bind(describe(MIXED, "cuda", 90), config_of(streams=2))
    assert stored._streams is None, "nor by a config that was stored"


def test_on_a_gpu_it_comes_first_where_each_part_has_its_own_first_choice():
    for spec, mode in ((MIXED, "eager"), (MIXED, "graph"), (MIXED.but(lengths=(1,) * 15 + (256,)), "graph")):
        own, best = rank_on("cuda", spec, 80, mode)
        assert own > best


def test_in_a_cuda_graph_it_comes_first_too_where_both_parts_are_walked_over_side_by_side():
    few = MIXED.but(lengths=(1,) * 30 + (30,))
    own, best = rank_on("cuda", few, 80, "graph")
    assert own > best
    both = on_gpu(80)
    both.parts()["chunks"].rank = lambda problem: 0
    default = both.configs(describe(few, "cuda", 90, "graph"))[0]
    assert (default["long"], default["streams"]) == ("walks", 2)
    for spec, mode in ((few, "eager"), (few.but(h=1, hv=2), "graph"), (few.but(lengths=(1,) * 30 + (60,)), "graph")):
        own, best = rank_on("cuda", spec, 80, mode)
        assert own < best


@pytest.mark.parametrize(
    ("device", "spec", "chunked_rank"),
    [
        ("cpu", MIXED, 80),
        ("cuda", MIXED, 60),  # what walks is the first choice for both parts
        ("cuda", MIXED.but(lengths=(500, 1000, 300)), 80),  # mild
        ("cuda", MIXED.but(lengths=(1,) * 64), 80),  # declined
        # two calls take the host longer than one kernel the GPU
        ("cuda", MIXED.but(lengths=(1,) * 15 + (256,), h=4, hv=8), 80),
    ],
)
def test_elsewhere_it_comes_after_every_other_but_the_reference(device, spec, chunked_rank):
    own, _ = rank_on(device, spec, chunked_rank)
    assert own == Composite.priority
    assert TorchReference.priority < own < min(b.priority for b in Composite().parts().values() if b.priority > 0)


# ---- where each sequence runs


def test_each_run_is_one_call_of_its_part_s_backend():
    short, long, both = pair()
    trial = Trial.of(SMALL)
    both.bind(trial.call.problem(), config_of())(trial.call)
    assert lengths_of(short.calls) == [(1, 1), (1, 0)]
    assert lengths_of(long.calls) == [(20, 0, 9)]


def test_a_sequence_of_the_threshold_s_length_is_short():
    for threshold, shorts in ((9, [(1, 1), (9, 1, 0)]), (8, [(1, 1), (1, 0)])):
        short, _, both = pair()
        trial = Trial.of(SMALL)
        both.bind(trial.call.problem(), config_of(threshold=threshold))(trial.call)
        assert lengths_of(short.calls) == shorts


def test_a_run_is_views_of_the_whole_call():
    _, long, both = pair()
    call = Trial.of(SMALL.but(update="separate", verify="tree", extra_rows=2)).call
    both.bind(call.problem(), config_of())(call)
    [part] = long.calls
    for name, axis, first in (
        *((name, 1, 2) for name in ("q", "k", "v", "a", "b", "out")),
        *((name, 0, 2) for name in ("read_slots", "write_slots", "intermediate_rows", "parents")),
    ):
        whole, view = getattr(call, name), getattr(part, name)
        assert view.shape[axis] == (29 if axis else 3)
        assert view.data_ptr() == whole.select(axis, first).data_ptr(), name
    assert part.pool is call.pool
    assert part.intermediates is call.intermediates
    assert (part.update, part.verify, part.max_seqlen) == ("separate", "tree", 20)


@pytest.mark.parametrize("update", ["none", "in_place", "disabled"])
def test_a_run_updates_as_the_whole_call_does(update):
    spec = SMALL.but(update=update, state_dtype="float32") if update != "none" else SMALL.but(state_dtype=None)
    short, long, both = pair()
    call = Trial.of(spec).call
    both.bind(call.problem(), config_of())(call)
    assert {part.update for part in (*short.calls, *long.calls)} == {update}


@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        SMALL.but(as_layout=False, cu_dtype="int64", index_dtype="int64"),
        SMALL.but(lengths=(30, 1, 1, 1), extra_rows=3, padded=(0, 2)),
        SMALL.but(lengths=(1, 8, 1, 8, 1), is_kda=True, state_layout="vk", strides="rows"),
        SMALL.but(update="separate", fresh=(2,), strides="any"),
        SMALL.but(verify="tree"),
        SMALL.but(state_dtype=None),
        SMALL.but(lengths=(0, 0, 12, 0, 1, 0)),
    ],
    ids=["layout", "offsets", "no slot", "kda", "separate", "tree", "no pool", "empty"],
)
def test_a_batch_taken_apart_equals_the_whole_bit_for_bit(spec):
    """The reference gives a sequence the same bits in any batch, so two of them as parts must, too."""
    whole, apart = Trial.of(spec), Trial.of(spec)
    TorchReference().bind(whole.call.problem(), Config())(whole.call)
    short, long, both = pair()
    out = both.bind(apart.call.problem(), config_of())(apart.call)
    assert out is apart.call.out
    assert short.calls
    assert long.calls
    for name in ("out", "pool", "intermediates"):
        one, other = getattr(whole.call, name), getattr(apart.call, name)
        assert (one is None and other is None) or torch.equal(bits(one), bits(other)), name


def test_without_an_output_one_is_made():
    _, _, both = pair()
    call, like = Trial.of(SMALL.but(extra_rows=1)).call, Trial.of(SMALL.but(extra_rows=1)).call
    run = both.bind(call.problem(), config_of())
    made = run(call.replace(out=None))
    assert torch.equal(made[:, :-1], run(like)[:, :-1])
    assert call.out is not made


@pytest.mark.parametrize("lengths", [(0, 0), ()])
def test_nothing_runs_where_there_is_no_token(lengths):
    short, long, both = pair()
    run = both.bind(describe(SMALL, "cpu"), config_of())
    call = Trial.of(SMALL.but(lengths=lengths)).call
    assert run(call) is call.out
    assert not short.calls
    assert not long.calls


def test_a_batch_of_one_side_is_one_call_as_it_came():
    for lengths, part in (((1, 2, 3), 0), ((20, 9, 5), 1)):
        backends = pair()
        call = Trial.of(SMALL.but(lengths=lengths)).call
        backends[2].bind(describe(SMALL, "cpu"), config_of())(call)
        assert backends[part].calls == [call]
        assert not backends[1 - part].calls


@pytest.mark.parametrize(("runs", "whole"), [(MOST_RUNS, False), (MOST_RUNS + 1, True)])
def test_a_batch_that_goes_to_and_fro_too_often_runs_whole_on_the_long_part_s_backend(runs, whole):
    short, long, both = pair()
    call = Trial.of(SMALL.but(lengths=((1, 9) * runs)[:runs])).call
    both.bind(call.problem(), config_of())(call)
    assert (long.calls == [call]) is whole
    assert bool(short.calls) is not whole


# ---- what is bound, and when


def test_each_run_is_bound_to_its_own_problem_once():
    short, long, both = pair()
    call = Trial.of(SMALL).call
    run = both.bind(call.problem(), config_of())
    run(call)
    before = len(short.bound), len(long.bound)
    run(Trial.of(SMALL, 1).call)
    assert (len(short.bound), len(long.bound)) == before
    for part, backend in ((c, b) for b in (short, long) for c in b.calls):
        assert part.problem() in [problem for problem, _ in backend.bound]


def test_bound_runners_are_bounded():
    _, _, both = pair()
    run = both.bind(describe(SMALL, "cpu"), config_of())
    for power in range(MOST_BOUND):
        for long in (False, True):
            run._runner(long, VarlenProfile.of(1, 2**power, 2**power))
            assert len(run._bound) <= MOST_BOUND


def test_everything_is_bound_before_anything_runs():
    short, long, both = pair()
    call = Trial.of(SMALL).call
    run = both.bind(describe(MIXED.but(h=1, hv=2, k=8, v=12), "cpu"), config_of())

    def fails(problem, config):
        raise RuntimeError("does not compile")

    long.bind = fails
    with pytest.raises(RuntimeError, match="does not compile"):
        run(call)
    assert not short.calls


def test_binding_from_many_threads_binds_once():
    short, long, both = pair()
    run = both.bind(describe(SMALL, "cpu"), config_of())
    before = len(short.bound) + len(long.bound)
    calls = [Trial.of(SMALL, seed).call for seed in range(4)]
    want = [Trial.of(SMALL, seed).call for seed in range(4)]
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(short.bound) + len(long.bound) <= before + 3
    for call, like in zip(calls, want, strict=True):
        run(like)
        assert torch.equal(bits(call.out), bits(like.out))


def test_a_config_that_is_not_offered_for_a_run_gives_way_to_one_that_keeps_the_bound():
    _, long, both = pair()
    both.bind(describe(MIXED, "cpu"), config_of(long="chunks[chunk=64]", chunk=16))
    assert long.bound[-1][1] == Config.of(chunk=16), "the first that is offered with chunks of at most 16"
    both.bind(describe(MIXED, "cpu"), config_of(long="chunks[chunk=64]", chunk=8))
    assert long.bound[-1][1] == Config.of(chunk=8)


def test_a_backend_that_declines_a_run_gives_way_to_the_first_that_accepts():
    short, long, both = pair(accepts=lambda problem: problem.profile.longest > 64)
    both.bind(describe(MIXED, "cpu"), config_of())
    assert long.bound
    call = Trial.of(SMALL).call
    both.bind(call.problem(), config_of())(call)
    assert not long.calls
    assert lengths_of(short.calls) == [(1, 1), (20, 0, 9), (1, 0)]


def test_no_part_breaks_the_bound_that_is_promised():
    only = Noting("chunks", chunks=(16,))
    with pytest.raises(NoBackendError, match="no config within the bound for chunks of 8 tokens"):
        made_of(only).bind(describe(MIXED, "cpu"), config_of(short="chunks", chunk=8))


def test_compiling_ahead_compiles_both_parts():
    short, long, both = pair()
    compiled = []
    for part in (short, long):
        part.compile = lambda problem, config, name=part.name: compiled.append((name, problem.profile.longest, config))
    both.compile(describe(MIXED, "cpu"), config_of())
    assert compiled == [("walks", 1, Config()), ("chunks", 2048, Config.of(chunk=16))]


def test_pinning_compiles_the_parts_and_keeps_nothing():
    short, long, both = pair()
    call = Trial.of(SMALL).call
    run = both.bind(call.problem(), config_of())
    assert run.pin(call) is None
    assert lengths_of(short.pinned) == [(1, 1), (1, 0)]
    assert lengths_of(long.pinned) == [(20, 0, 9)]
    assert not short.calls
    assert not long.calls


def test_layers_share_the_offsets_of_a_layout(monkeypatch):
    short, long, both = pair()
    call = Trial.of(SMALL).call
    run = both.bind(call.problem(), config_of())
    run(call)
    run(call)
    for part in (short, long):
        half = len(part.calls) // 2
        for one, other in zip(part.calls[:half], part.calls[half:], strict=True):
            assert one.layout is other.layout
            assert one.cu_seqlens is other.cu_seqlens


def test_a_forked_child_without_torch_s_threads_is_told(monkeypatch):
    forks = Forks(OP, type("Owner", (), {"forget": lambda self: None})().forget)
    forks._threads_lost = True
    monkeypatch.setattr("isokern.registry.forks._torch_threads", lambda: 2)
    with pytest.raises(ForkedProcessError, match="torch's CPU threads"):
        forks.check(describe(SMALL, "cpu"), Composite())


def test_through_the_registry():
    """The op itself, on its real parts: forced, twice with other lengths of the same profile, and explained."""
    mine = Registry(load_plugins=False)
    op = mine.get(OP)
    for lengths in ((1,) * 7 + (40,), (1,) * 6 + (2, 39)):
        spec = SMALL.but(name=str(lengths), lengths=lengths)
        kwargs, like = (mine.spec(OP).make_inputs(spec, 3).kwargs for _ in range(2))
        out, want = op(**kwargs, backend="composite"), op(**like, backend="torch_reference")
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(kwargs["initial_state_source"], like["initial_state_source"], rtol=1e-4, atol=1e-5)
    decision = op.decide(**kwargs)
    assert decision.backend == "numba_cpu", "the first choice for both parts on a CPU"
    assert isinstance(decision.outcome_of("composite"), Accepted)
    assert op.decide(**kwargs, backend="composite").config["short"] == "numba_cpu"


# ---- parts that cut sequences into segments


def test_what_cuts_runs_long_sequences_and_the_config_says_where_it_cuts():
    cuts = Noting("cuts", 30, chunks=(16,), cuts=lambda problem: (32, 64))
    both = made_of(Noting("walks", 20), cuts, Noting("chunks", 10, chunks=(16,)))
    offered = both.configs(describe(MIXED, "cpu"))
    assert offered[0] == config_of(long="cuts[chunk=16,cut=32]", threshold=32, cut=32)
    assert {(c["long"], c["cut"]) for c in offered} == {
        ("cuts[chunk=16,cut=32]", 32),
        ("cuts[chunk=16,cut=64]", 64),
        ("chunks[chunk=16]", 0),
        ("walks", 0),
    }
    assert {c["short"] for c in offered} == {"walks", "chunks[chunk=16]"}, "nothing cuts short sequences"


def test_what_cuts_is_tried_further_down_the_order_but_not_where_it_is_known_to_lose():
    walks, chunks = Noting("walks", 30), [Noting(f"chunks {i}", 20 - i, chunks=(16,)) for i in range(3)]
    cuts = Noting("cuts", 1, chunks=(16,), cuts=lambda problem: (32,))
    both, problem = made_of(walks, *chunks, cuts), describe(MIXED, "cpu")
    assert "cuts[chunk=16,cut=32]" in {c["long"] for c in both.configs(problem)}
    cuts.hopeless = lambda problem: "too short"
    assert "cuts[chunk=16,cut=32]" not in {c["long"] for c in both.configs(problem)}


@pytest.mark.parametrize(
    ("parts", "together"),
    [
        ((Chunked(0), Chunked(64)), Chunked(64)),
        ((Chunked(16), Chunked(64)), Chunked(64)),
        ((Chunked(0), Chunked(64, cut=256)), Chunked(64, cut=256)),
        ((Chunked(64), Chunked(64, True, 256)), Chunked(64, True, 256)),
        ((Chunked(64, True), Chunked(64, cut=256)), Chunked(64, True, 256)),
        (
            (Chunked(128), Chunked(64, True)),
            None,
        ),  # 64: states are rounded twice as often as by 128
        ((Chunked(128), Chunked(64, cut=192)), None),  # 192 is no multiple of 128
        ((Chunked(64, cut=128), Chunked(64, cut=256)), None),
    ],
)
def test_two_parts_have_a_bound_in_common_or_none(parts, together):
    assert common(*parts) == common(*reversed(parts)) == together


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (Chunked(64), Chunked(128)),
        (Chunked(64), Chunked(64, True)),
        (Chunked(64), Chunked(64, cut=128)),
        (Chunked(64, cut=256), Chunked(64, cut=128)),
        (Chunked(64, cut=256), Chunked(64, cut=512)),
        (Chunked(64, True), Chunked(16, True)),
    ],
)
def test_a_bound_does_not_cover_what_errs_otherwise(whole, part):
    assert not covers(whole, part)


def test_a_batch_with_no_bound_in_common_is_declined():
    parts = Noting("fine", 10, chunks=(16,), cuts=lambda problem: (48,)), Noting("coarse", 20, chunks=(32,))
    both = made_of(*parts)
    parts[1].accepts = lambda problem: problem.profile.longest == 1
    verdict = both.check(describe(MIXED, "cpu"))
    assert not verdict
    assert "no error bound covers both parts" in verdict.reason


def test_the_suite_and_the_tuner_take_the_bound_from_the_config():
    assert chunk_of(Composite(), config_of(chunk=0)) == 0
    assert chunk_of(Composite(), config_of()) == 16
    assert chunk_of(Composite(), config_of(cut=32)) == Chunked(16, False, 32)
    assert chunk_of(CompositeBf16(), config_of()) == Chunked(16, True)
    assert chunk_of(CompositeBf16(), config_of(cut=32)) == Chunked(16, True, 32)
    with pytest.raises(PredicateFault, match="a backend that cuts sequences needs a cut"):
        chunk_of(Composite(), Config.of(chunk=16))


def test_a_run_is_cut_where_the_config_says_whatever_is_offered_for_its_own_lengths():
    cuts = Noting("cuts", 30, chunks=(16,), cuts=lambda problem: (problem.profile.tokens,))
    both = made_of(Noting("walks", 20), cuts)
    for lengths in ((1,) * 7 + (40,), (1,) * 3 + (40, 40)):
        call = Trial.of(SMALL.but(lengths=lengths)).call
        config = both.configs(call.problem())[0]
        assert config["cut"] == 64
        both.bind(call.problem(), config)(call)
        problem, bound_to = cuts.bound[-1]
        assert bound_to["cut"] == 64
    assert problem.profile.tokens == 128, "offered for this run alone: another cut"


@pytest.mark.parametrize("cut", [0, 16, 48])
def test_a_config_that_misstates_the_cut_never_runs_what_cuts(cut):
    cuts = Noting("cuts", 30, chunks=(16,), cuts=lambda problem: (32,))
    walks = Noting("walks", 20)
    call = Trial.of(SMALL).call
    made_of(walks, cuts).bind(call.problem(), config_of(long="cuts[chunk=16,cut=32]", cut=cut))(call)
    assert not cuts.calls
    assert lengths_of(walks.calls) == [(1, 1), (20, 0, 9), (1, 0)]


class AtItsBound(Noting):
    """Errs in one value by most of what its own bound allows: by more than that of float32 and whole sequences does."""

    def bind(self, problem, config):
        inner = super().bind(problem, config)

        def run(call):
            own = reference(call, chunk=Chunked(config["chunk"], self.accuracy == "rounded", config["cut"]))
            whole = reference(call, chunk=config["chunk"])
            out = inner(call)
            wider = own.o_bound > 1.2 * whole.o_bound
            assert wider.any()
            least = torch.where(wider, own.o_bound, torch.inf).argmin()  # so that the sum of errors stays small
            at = torch.unravel_index(least, own.o_bound.shape)
            out[0][at] = (own.o + 0.95 * own.o_bound)[at].to(out.dtype)
            return out

        return run


LONG = CaseSpec("long", (1,) * 7 + (300,), h=1, hv=2, k=8, v=40, as_layout=True, io_dtype="float32")


@pytest.mark.parametrize(("kind", "rounds"), [(Composite, False), (CompositeBf16, True)])
def test_an_understated_cut_does_not_pass_the_gate(kind, rounds, monkeypatch, record_property):
    """What cuts is within the bound of its cut; planted: nothing asks whether the bound of the whole covers a part."""
    spec = LONG.but(distribution="long_memory")
    at = AtItsBound("at", chunks=(16,), cuts=lambda problem: (32,), rounds=rounds)
    walks = Noting("walks", 20)
    both = made_of(walks, at, kind=kind)
    config = both.configs(describe(spec, "cpu"))[0]
    assert (config["long"], config["cut"]) == ("at[chunk=16,cut=32]", 32)
    right = gate(OP, both, config, spec, adversarial=spec, seeds=(0,))
    assert right.ok, right.reason
    assert right.worst_ratio > 0.9
    monkeypatch.setattr(bound, "covers", lambda whole, part: True)
    exact, understated = made_of(walks, at), Config.from_dict(config.to_dict() | {"cut": 0})
    exact.parts, exact.configs = both.parts, lambda problem: (understated,)
    found = gate(OP, exact, understated, spec, adversarial=spec, seeds=(0,))
    assert found.code is RejectCode.WRONG
    assert "times its error bound away" in found.reason
    record_property("planted fault", f"{both.name}   {'a config that understates its cut':40} rejected by the gate")


# ---- parts that round operands


def trio(kind=CompositeBf16, **options):
    parts = Noting("walks", 30), Noting("chunks", 20, chunks=(16,)), Noting("rounds", 10, chunks=(16,), rounds=True)
    return made_of(*parts, *options.pop("more", ()), kind=kind)


def test_only_the_rounded_composite_has_parts_that_round():
    assert set(trio(Composite).parts()) == {"walks", "chunks"}
    assert set(trio().parts()) == {"walks", "chunks", "rounds"}
    assert "cupy_chunked_bf16" not in Composite().parts()
    assert {"cupy_chunked_bf16", "cupy_cut_bf16", "cupy_cut", "cupy"} <= set(CompositeBf16().parts())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_part_at_least_rounds(device):
    cuts = Noting("cuts", 5, chunks=(16,), cuts=lambda problem: (32,), rounds=True)
    offered = trio(more=[cuts]).configs(describe(MIXED, device, 90))
    assert (offered[0]["short"], offered[0]["long"]) == ("walks", "rounds[chunk=16]")
    assert {config["long"] for config in offered} == {"rounds[chunk=16]", "cuts[chunk=16,cut=32]"}
    assert "chunks[chunk=16]" in {config["short"] for config in offered}
    exact = trio(Composite, more=[cuts]).configs(describe(MIXED, device, 90))
    assert not any("rounds" in config["long"] or "cuts" in config["long"] for config in exact)


@pytest.mark.parametrize(
    ("spec", "device", "code", "reason"),
    [
        (MIXED, "cpu", RejectCode.DEVICE, "cupy_chunked_bf16: runs on NVIDIA GPUs"),
        (MIXED.but(io_dtype="float16"), "cuda", RejectCode.DTYPE, "cupy_chunked_bf16: takes q and k as bfloat16"),
        (MIXED.but(is_kda=True), "cuda", RejectCode.FEATURE, "KDA"),
        (MIXED.but(verify="chain"), "cuda", RejectCode.FEATURE, "after each of its tokens"),
        (MIXED.but(as_layout=False), "cuda", RejectCode.FEATURE, "SequenceLayout"),
        (MIXED.but(lengths=(64,) * 4), "cuda", RejectCode.SHAPE, "nothing to split"),
    ],
)
def test_where_nothing_rounds_the_part_says_why(spec, device, code, reason):
    verdict = CompositeBf16().check(describe(spec, device, 90))
    assert isinstance(verdict, Rejected)
    assert verdict.code is code
    assert reason in verdict.reason


def test_without_a_backend_that_rounds_there_is_no_rounded_composite():
    verdict = made_of(Noting("walks"), kind=CompositeBf16).check(describe(MIXED, "cpu"))
    assert not verdict
    assert "none of the backends that could run a part rounds" in verdict.reason


def own_registry(tmp_path) -> Registry:
    """Of both composites of one trio."""
    mine = Registry({}, load_plugins=False)
    mine.register_op(SPEC)
    for kind in (Composite, CompositeBf16):
        mine.register_backend(trio(kind))
    mine.use_store(Store([Layer("explicit", tmp_path, writable=True)]))
    return mine


def test_it_is_a_candidate_where_rounded_operands_are_allowed_alone(tmp_path):
    mine = own_registry(tmp_path)
    for accuracy, admitted in (("float32", {"composite"}), ("rounded", {"composite", "composite_bf16"})):
        problem = describe(MIXED, "cpu", accuracy=accuracy)
        assert {c.backend for c in admit(mine, OP, problem).candidates} == admitted
    unasked, named = (
        {o.backend: o.verdict for o in verdicts(mine.backends(OP), describe(MIXED, "cpu"), names)}["composite_bf16"]
        for names in ((), {"composite_bf16"})
    )
    assert (unasked.code, bool(named)) == (RejectCode.POLICY, True)


def test_its_configs_come_back_from_a_store(tmp_path):
    mine = own_registry(tmp_path)
    problem, environment = describe(HEAVY, "cpu", accuracy="rounded"), mine.environment("cpu")
    cuts = Noting("cuts", 5, chunks=(16,), cuts=lambda problem: (32,), rounds=True)
    for config in trio(more=[cuts]).configs(problem):
        values = config.to_dict()
        record = CandidateRecord(
            "composite_bf16", values, "ok", median_us=1.0, samples_us=(1.0,),
            fingerprint=mine.fingerprint(OP, "composite_bf16"),
        )  # fmt: skip
        entry = Entry(
            op=OP, contract_version=SPEC.contract_version, key=problem.tuning_key(), environment=environment.hash,
            backend="composite_bf16", config=values, rule="made up", candidates=(record,), margin_over_runner_up=None,
            margin_over_default=None, measured={
                "policy": "eager", "created": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "isokern": "0",
                "launches": 1, "method": "made up",
            },
        )  # fmt: skip
        mine.store.put(entry, environment)
        mine.refresh()
        decision = mine.dispatcher(OP).decide(problem)
        assert (decision.rule, decision.backend) == (Rule.TUNED_USER, "composite_bf16")
        assert Config.from_dict(decision.config) == config
        for side in ("short", "long"):
            assert str(Part.parse(config[side])) == config[side]


ROWS = MIXED.but(lengths=(1,) * 130 + (2048,))


@pytest.mark.parametrize(
    ("spec", "accuracy", "first"),
    [
        (ROWS, "float32", "composite"),
        (ROWS, "rounded", "composite_bf16"),
        (ROWS.but(h=4, hv=8), "float32", "composite"),
        (ROWS.but(h=4, hv=8), "rounded", "composite_bf16"),
        (ROWS.but(io_dtype="float16"), "rounded", "composite"),
        (ROWS.but(is_kda=True), "rounded", "cupy"),
        (MIXED, "float32", "composite"),
        (MIXED, "rounded", "composite_bf16"),  # 33 tokens a sequence, 64 in buckets: mostly rows
        (MIXED.but(h=4, hv=8), "float32", "composite"),
        (MIXED.but(h=4, hv=8), "rounded", "composite_bf16"),
        (MIXED.but(lengths=(1,) * 31 + (2048,)), "rounded", "cupy_chunked_bf16"),  # 65, 128 in buckets: mostly prompts
        (MIXED.but(lengths=(1,) * 31 + (2048,), h=4, hv=8), "rounded", "cupy_cut_bf16"),
        (MIXED.but(lengths=(6000, *[64] * 31)), "float32", "cupy_cut"),
        (MIXED.but(lengths=(6000, *[64] * 31)), "rounded", "cupy_chunked_bf16"),
        (MIXED.but(lengths=(256,) * 16 + (1,) * 48), "rounded", "cupy_chunked_bf16"),  # mild
        (MIXED.but(lengths=(1,) * 64), "rounded", "cupy"),
    ],
)
def test_the_first_choice_under_either_policy(spec, accuracy, first):
    """Mostly rows: rounded parts where allowed. Mostly prompts: left whole to what cuts, or where allowed, rounds."""
    own = {name: b for name, b in registry.backends(OP).items() if name.startswith(("cupy", "composite"))}
    problem = describe(spec, "cuda", 90, accuracy=accuracy)
    assert next(o.backend for o in verdicts(own, problem) if o.verdict) == first


# ---- in the tuner


def test_it_is_admitted_with_every_config_beside_the_others():
    admission = admit(Registry(load_plugins=False), OP, describe(HEAVY, "cpu"))
    mine = [c.config for c in admission.candidates if c.backend == "composite"]
    assert tuple(mine) == Composite().configs(describe(HEAVY, "cpu"))
    assert all(c.origin is None for c in admission.candidates), "a worker finds it by itself"
    assert admission.candidates[0].backend == "numba_cpu"


@pytest.mark.parametrize("config", Composite().configs(describe(HEAVY, "cpu")), ids=lambda config: config.label)
def test_every_config_passes_the_gate(config):
    result = gate(OP, Composite(), config, HEAVY, adversarial=adversarial_twin(HEAVY))
    assert result.ok, result.reason
    assert result.repeatable


def test_a_wrong_part_does_not_pass_the_gate():
    class Wrong(Noting):
        def bind(self, problem, config):
            inner = super().bind(problem, config)
            return lambda call: inner(call).mul_(1.02)

    config = config_of(short="wrong", threshold=4)
    both = made_of(Wrong("wrong", 20), Noting("chunks", 10, chunks=(16,)))
    assert config in both.configs(describe(HEAVY.but(lengths=(1, 1, 9)), "cpu"))
    assert gate(OP, both, config, HEAVY.but(lengths=(1, 1, 9))).code is RejectCode.WRONG


# ---- two streams


class FakeCuda:
    """Streams that do nothing until :meth:`finish`, and then as badly as events allow: ``late`` ones last."""

    def __init__(self):
        self.streams = []
        self.at = self.Stream("cuda:0")

    def Stream(self, device, priority=0):
        stream = FakeStream(device, priority)
        self.streams.append(stream)
        return stream

    def Event(self):
        return FakeEvent()

    def current_stream(self, device):
        return self.at

    def stream(self, stream):
        return Within(self, stream)

    def launch(self, work):
        self.at.queue.append(work)

    def finish(self, late):
        order = sorted(self.streams, key=lambda stream: stream is late)
        while any(stream.queue for stream in order):
            stream = next(s for s in order if s.queue and s.ready)
            stream.queue.popleft()()


class FakeEvent:
    def __init__(self):
        self.mark = None

    def record(self, stream):
        mark = self.mark = {"done": False}
        stream.queue.append(lambda: mark.update(done=True))


class FakeStream:
    def __init__(self, device, priority):
        self.device, self.priority, self.queue = device, priority, deque()

    def wait_event(self, event):
        mark = event.mark

        def wait():
            assert mark["done"]

        wait.mark = mark
        self.queue.append(wait)

    @property
    def ready(self):
        return getattr(self.queue[0], "mark", {"done": True})["done"]


class Within:
    def __init__(self, cuda, stream):
        self.cuda, self.stream = cuda, stream

    def __enter__(self):
        self.before, self.cuda.at = self.cuda.at, self.stream

    def __exit__(self, *exc):
        self.cuda.at = self.before


def happened(streams: SideStreams, cuda: FakeCuda, late: int, fails: bool = False) -> list[str]:
    """The order in which things are done, the stream ``late`` always last where it has the choice."""
    log: list[str] = []
    cuda.launch(lambda: log.append("before"))

    def here():
        cuda.launch(lambda: log.append("here"))
        if fails:
            raise RuntimeError("no launch")

    try:
        streams.both("cuda:0", lambda: cuda.launch(lambda: log.append("aside")), here)
    except RuntimeError:
        log.append("raised")
    assert cuda.at is cuda.streams[0], "the current stream is current again"
    cuda.launch(lambda: log.append("after"))
    cuda.finish(cuda.streams[late])
    return log


@pytest.mark.parametrize("late", [0, 1])
def test_what_runs_aside_begins_after_what_came_before_and_ends_before_what_follows(late):
    cuda = FakeCuda()
    streams = SideStreams(cuda)
    for _ in range(3):
        log = happened(streams, cuda, late)
        assert (log[0], log[-1], sorted(log[1:-1])) == ("before", "after", ["aside", "here"])


@pytest.mark.parametrize("late", [0, 1])
def test_the_streams_come_together_again_where_a_launch_fails(late):
    log = happened(SideStreams(cuda := FakeCuda()), cuda, late, fails=True)
    assert log[-1] == "after"
    assert set(log) == {"raised", "before", "aside", "here", "after"}


@pytest.mark.parametrize(("forgotten", "late"), [("wait for begin", 0), ("wait for end", 1)])
def test_a_forgotten_wait_shows(forgotten, late, record_property):
    """Planted: the side stream does not wait for the current one, or is not waited for."""
    cuda = FakeCuda()
    streams = SideStreams(cuda)
    streams.both("cuda:0", lambda: None, lambda: None)
    side = cuda.streams[1]
    deaf = side if forgotten == "wait for begin" else cuda.streams[0]
    deaf.wait_event = lambda event: None
    log = happened(streams, cuda, late)
    assert (log[0], log[-1]) != ("before", "after")
    record_property("planted fault", f"composite   {'no ' + forgotten:40} found by the order of work on streams")


def test_one_side_stream_for_each_device_and_thread_of_higher_priority():
    cuda = FakeCuda()
    streams = SideStreams(cuda)
    work = ("cuda:0", lambda: None, lambda: None)
    streams.both(*work)
    streams.both(*work)
    assert len(cuda.streams) == 2
    assert cuda.streams[1].priority < cuda.streams[0].priority
    thread = threading.Thread(target=streams.both, args=work)
    thread.start()
    thread.join()
    assert len(cuda.streams) == 3
    streams.both("cuda:1", *work[1:])
    assert [stream.device for stream in cuda.streams] == ["cuda:0", "cuda:0", "cuda:0", "cuda:1"]


def test_with_two_streams_the_long_part_runs_aside(monkeypatch):
    short, long, both = pair()
    queued = []

    def noted(self, device, aside, here):
        for where, work in (("aside", aside), ("here", here)):
            work()
            queued.append((where, len(short.calls), len(long.calls)))

    monkeypatch.setattr(SideStreams, "both", noted)
    call = Trial.of(SMALL).call
    both.bind(call.problem(), config_of(streams=2))(call)
    assert queued == [("aside", 0, 1), ("here", 2, 1)]

    queued.clear()
    one_side = Trial.of(SMALL.but(lengths=(1, 1))).call
    both.bind(call.problem(), config_of(streams=2))(one_side)
    both.bind(call.problem(), config_of(streams=1))(call)
    assert not queued, "one part alone needs no second stream"


def test_the_real_torch_cuda_has_what_the_fake_stands_for():
    for name in ("Stream", "Event", "current_stream", "stream"):
        assert hasattr(torch.cuda, name)
    for kind, methods in ((torch.cuda.Stream, ("wait_event",)), (torch.cuda.Event, ("record",))):
        assert all(hasattr(kind, method) for method in methods)
