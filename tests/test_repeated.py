"""What a bench times: a call as the op makes it from the second time on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isokern import registry
from isokern.autotune.repeated import repeated_call
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec

OP = "fused_sigmoid_gating"
SPEC = registry.spec(OP)


@pytest.fixture
def call():
    spec = CaseSpec("two rows and a prompt", (1, 1, 5), h=1, hv=2, k=8, v=16, as_layout=True)
    return SPEC.canonical(**SPEC.make_inputs(spec, 0).kwargs)


class Runner:
    """Runs records of a call, and remembers which."""

    def __init__(self):
        self.records = []

    def __call__(self, call):
        self.records.append(call)
        return call.out


class ByTensors(Runner):
    def __init__(self):
        super().__init__()
        self.runs, self.shown = [], []

    def pin(self, call):
        self.shown.append(call)
        return self.runs.append


class ByLayout(ByTensors):
    def __init__(self):
        super().__init__()
        self.laid = []

    def pin(self, call):
        """As of composites: such calls need their lengths."""

    def pin_by_layout(self, call):
        self.shown.append(call)
        return lambda tensors, layout: self.laid.append((tensors, layout))


def test_a_runner_that_can_be_pinned_is_and_gets_the_tensors_with_a_new_output_each_time(call):
    runner = ByTensors()
    run = repeated_call(SPEC, runner, call)
    run()
    run()
    assert runner.records == []
    one, two = runner.runs
    at = SPEC.tensors.index("out")
    assert one[at].shape == call.v.shape
    assert one[at] is not two[at]
    assert all(one[i] is getattr(call, name) for i, name in enumerate(SPEC.tensors) if i != at)
    assert runner.shown[0].out is not None, "what is pinned has its output"


def test_a_runner_that_needs_the_lengths_gets_the_layout(call):
    runner = ByLayout()
    repeated_call(SPEC, runner, call)()
    [(tensors, layout)] = runner.laid
    assert layout is call.layout
    assert tensors[SPEC.tensors.index("q")] is call.q
    assert (runner.records, runner.runs) == ([], [])


def test_without_a_layout_it_is_asked_for_the_other_form(call):
    bare = replace(call, layout=None)
    runner = ByLayout()
    repeated_call(SPEC, runner, bare)()
    assert (len(runner.records), runner.laid) == (1, []), "which it does not have"


def test_a_runner_of_whole_calls_gets_a_new_record_each_time(call):
    runner = Runner()
    run = repeated_call(SPEC, runner, call)
    run()
    run()
    one, two = runner.records
    assert one is not two
    assert call not in runner.records
    assert isinstance(one.out, torch.Tensor)
    assert one.out is not two.out


def test_nothing_runs_before_it_is_called(call):
    for runner in (Runner(), ByTensors(), ByLayout()):
        repeated_call(SPEC, runner, call)
        assert runner.records == []


@pytest.mark.parametrize("name", ["torch_reference", "torch_vectorized", "numba_cpu"])
def test_it_computes_what_the_op_does(name, call):
    backend = registry.backends(OP)[name]
    problem = call.problem()
    runner = backend.bind(problem, backend.configs(problem)[0])
    kept = []
    allocate = SPEC.allocate
    spec = replace(SPEC, allocate=lambda c: kept.append(allocate(c)) or kept[-1])
    pool = call.pool.clone()
    repeated_call(spec, runner, call)()
    found, state = kept[-1].clone(), call.pool.clone()
    call.pool.copy_(pool)
    call.out = allocate(call)
    runner(call)
    assert torch.equal(found, call.out)
    assert torch.equal(state, call.pool)
