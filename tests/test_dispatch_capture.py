"""Inside a CUDA graph capture nothing compiles: what was prepared, or ran before, serves; else a typed error."""

from __future__ import annotations

import pytest
import torch

from isokern.errors import ArgumentTypeError, ArgumentValueError, BackendDeclinedError, NotPreparedError
from isokern.registry import Accepted, Backend, Config, Registry, RejectCode, Rejected, Rule
from isokern.registry.ops.fused_sigmoid_gating import first, hot
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.selection import Suggestion, Suggestions

BASE = CaseSpec("decode", (1, 1), k=8, v=8)
EAGER, GRAPH = (describe(BASE, "cuda", 90, mode) for mode in ("eager", "graph"))


class Compiled(Backend):
    """A GPU backend that notes what it compiles."""

    op, provenance = "fused_sigmoid_gating", "triton"

    def __init__(self, name, priority, graphs=True):
        self.name, self.priority, self.graphs = name, priority, graphs
        self.compiled = []

    def check(self, problem):
        if problem.mode == "graph" and not self.graphs:
            return Rejected(RejectCode.MODE, "not inside graphs")
        return Accepted()

    def configs(self, problem):
        return (Config.of(tile=4), Config.of(tile=8))

    def bind(self, problem, config):
        self.compiled.append((problem.mode, config.label))
        return lambda call: call.out


def dispatcher_of(*backends, tuned=lambda problem: ()):
    registry = Registry({}, load_plugins=False)
    registry.register_op(SPEC)
    for backend in backends:
        registry.register_backend(backend)
    registry.suggestions = lambda spec, problem: Suggestions(tuple(tuned(problem)))
    return registry.dispatcher(SPEC.name)


def test_in_a_capture_nothing_compiles_and_the_error_says_what_to_do():
    backend = Compiled("fast", 50)
    dispatcher = dispatcher_of(backend)
    with pytest.raises(NotPreparedError, match=r"'fast', config \[tile=4\] .* op\.prepare\(.*isokern warmup") as caught:
        dispatcher.resolve(GRAPH)
    assert (caught.value.backend, caught.value.config, caught.value.problem) == ("fast", "tile=4", GRAPH.label)
    assert backend.compiled == []
    assert dispatcher.bound == {}


def test_after_prepare_both_modes_are_ready():
    for problem in (EAGER, GRAPH):
        backend = Compiled("fast", 50)
        dispatcher = dispatcher_of(backend)
        dispatcher.prepare(problem)
        assert sorted(mode for mode, _ in backend.compiled) == ["eager", "graph"]
        dispatcher.resolve(GRAPH)
        dispatcher.resolve(EAGER)
        assert len(backend.compiled) == 2


def test_after_a_call_from_the_host_the_same_choice_serves_in_a_capture():
    backend = Compiled("fast", 50)
    dispatcher = dispatcher_of(backend)
    eager = dispatcher.resolve(EAGER)
    graph = dispatcher.resolve(GRAPH)
    assert graph.runner is eager.runner
    assert (graph.decision.backend, graph.decision.notes) == ("fast", ())
    assert backend.compiled == [("eager", "tile=4")]


def tuned_apart(problem):
    yield Suggestion(Rule.TUNED_USER, "fast", {"tile": 4 if problem.mode == "eager" else 8}, "store")


def test_where_graphs_prefer_something_else_the_compiled_kernel_serves_and_the_decision_says_so():
    backend = Compiled("fast", 50)
    dispatcher = dispatcher_of(backend, tuned=tuned_apart)
    eager = dispatcher.resolve(EAGER)
    graph = dispatcher.resolve(GRAPH)
    assert graph.runner is eager.runner
    assert graph.decision.config == {"tile": 4}
    assert graph.decision.notes[-1] == (
        "compiled for calls from the host only; after op.prepare(...) graphs run fast [tile=8]"
    )


def test_prepared_graphs_run_their_own_choice():
    backend = Compiled("fast", 50)
    dispatcher = dispatcher_of(backend, tuned=tuned_apart)
    dispatcher.prepare(EAGER)
    assert dispatcher.resolve(GRAPH).decision.config == {"tile": 8}
    assert dispatcher.resolve(EAGER).decision.config == {"tile": 4}


def test_a_kernel_that_declines_graphs_does_not_serve_there():
    host_only, other = Compiled("host_only", 50, graphs=False), Compiled("other", 10)
    dispatcher = dispatcher_of(host_only, other)
    assert dispatcher.resolve(EAGER).decision.backend == "host_only"
    with pytest.raises(NotPreparedError, match="'other'"):
        dispatcher.resolve(GRAPH)
    with pytest.raises(BackendDeclinedError, match="not inside graphs"):
        dispatcher.resolve(GRAPH, "host_only")


def test_what_declines_graphs_is_prepared_for_the_host():
    backend = Compiled("host_only", 50, graphs=False)
    [bound] = dispatcher_of(backend).prepare(EAGER)
    assert bound.decision.backend == "host_only"
    assert [mode for mode, _ in backend.compiled] == ["eager"]


def test_another_backend_by_name_is_not_replaced_by_the_one_that_ran():
    fast, other = Compiled("fast", 50), Compiled("other", 10)
    dispatcher = dispatcher_of(fast, other)
    dispatcher.resolve(EAGER)
    with pytest.raises(NotPreparedError, match="'other'"):
        dispatcher.resolve(GRAPH, "other")


def test_torch_s_own_operators_have_nothing_to_compile():
    backend = Compiled("plain", 50)
    backend.provenance = "torch"
    assert dispatcher_of(backend).resolve(GRAPH).decision.backend == "plain"


class TestTheOp:
    @pytest.fixture
    def op(self):
        dispatcher = dispatcher_of(Compiled("fast", 50))
        return dispatcher.registry.get(SPEC.name)

    def test_prepare_takes_a_problem_or_a_call(self, op):
        kwargs = make_inputs(BASE).kwargs
        by_call = op.prepare(**kwargs)
        assert by_call.problem == op.decide(**kwargs).problem
        by_problem = op.prepare(problem=EAGER)
        assert (by_problem.backend, by_problem.problem) == ("fast", EAGER.key())
        for bad in ({}, {"problem": EAGER, **kwargs}):
            with pytest.raises(ArgumentTypeError, match="problem"):
                op.prepare(**bad)

    def test_a_prepared_problem_binds_nothing_at_its_first_call(self, op):
        kwargs = make_inputs(BASE).kwargs
        backend = op.dispatcher.registry.backends(SPEC.name)["fast"]
        op.prepare(**kwargs)
        compiled = list(backend.compiled)
        op(**kwargs)
        assert backend.compiled == compiled

    def test_prepare_pins_what_can_be_pinned_so_that_specialised_kernels_compile(self):
        pinned = []

        class Launcher:
            def __call__(self, call):
                raise AssertionError("prepare runs nothing")

            def pin(self, call):
                pinned.append(call)
                return lambda tensors: None

        backend = Compiled("fast", 50)
        backend.bind = lambda problem, config: Launcher()
        op = dispatcher_of(backend).registry.get(SPEC.name)
        kwargs = make_inputs(BASE).kwargs
        op.prepare(**kwargs)
        assert pinned[0].out.shape == kwargs["v"].shape

    def test_a_capture_is_another_kind_of_call(self, op, monkeypatch):
        kwargs = make_inputs(BASE).kwargs
        op(**kwargs)
        [entry] = op.entries.recent
        entry.on_cuda = True  # as far as the hot path can tell
        monkeypatch.setattr(hot, "is_current_stream_capturing", lambda: True)
        op(**kwargs)
        assert op.stats()["misses"] == 2
        monkeypatch.setattr(hot, "is_current_stream_capturing", lambda: False)
        op(**kwargs)
        assert op.stats()["misses"] == 2

    def test_full_validation_would_wait_for_the_device(self, op, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(first, "canonical_call", lambda **kwargs: OnGpu())
        with pytest.raises(ArgumentValueError, match="validate"):
            op(**make_inputs(BASE).kwargs, validate="full")


class OnGpu:
    class q:
        is_cuda = True
