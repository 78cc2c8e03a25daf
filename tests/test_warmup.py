"""Planning, tuning, proving and resuming a model's workload; on planted backends, so that it takes seconds."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

from isokern.autotune.compiling import Compilers
from isokern.autotune.cost import CostModel, compile_seconds, warmup_seconds
from isokern.autotune.device_lock import device_lock
from isokern.autotune.examine import GatePolicy
from isokern.autotune.policy import MeasurePolicy, RacePolicy, ScreenPolicy, TunePolicy
from isokern.autotune.progress import Progress
from isokern.autotune.report import format_duration, plan_summary, plan_table, report_summary, report_table
from isokern.autotune.tuner import Settings
from isokern.autotune.turns import Waiting, in_turn, ordered
from isokern.autotune.warmup import Interrupted, plan_shards, plan_warmup, run_warmup, shards_of
from isokern.autotune.worker import Limits, Worker
from isokern.cache import Layer, Store
from isokern.errors import ArgumentValueError, CatalogueError, UnknownNameError
from isokern.registry.core import Registry
from isokern.registry.decision import Rule
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.catalogue import catalogue, model
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin, concrete
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.timing import bytes_moved, rotated_calls, state_bytes, with_room
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.ops.fused_sigmoid_gating.validate_values import check_values
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Policy, parse_case
from isokern.registry.ops.fused_sigmoid_gating.workloads import Tier, serving_cases
from isokern.registry.overrides import use

OP = "fused_sigmoid_gating"
MODEL = "qwen3-next-80b-a3b"
TP = 8  # two key heads and four value heads per rank: milliseconds
PLANTED = Path(__file__).with_name("planted_backends.py")
SETTINGS = Settings(
    TunePolicy(
        screen=ScreenPolicy(first_samples=1),
        race=RacePolicy(rounds=(5,), sentinel_drift=0.99, wall_cap_s=2.0),
        measure=MeasurePolicy(min_sample_us=50.0, rotate_l2=1.0),
    ),
    GatePolicy(seeds=1, hopeless_ratio=10.0),
    Limits(call=20.0),
)


@pytest.fixture(scope="module", autouse=True)
def lock_of_its_own(tmp_path_factory):
    """A tuner at work on this machine must not make these tests wait."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("locks"))
    yield
    tempfile.tempdir = before


def load_planted():
    spec = importlib.util.spec_from_file_location("planted_backends", PLANTED)
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_backends"] = module
    spec.loader.exec_module(module)
    return module


planted = load_planted()


def registry_of(*kinds) -> Registry:
    registry = Registry(load_plugins=False)
    for name in tuple(registry.backends(OP)):
        registry.unregister_backend(OP, name)
    for kind in kinds:
        registry.register_backend(kind())
    return registry


def plan_at(root: Path, cases=("decode N=1", "verify 2x2"), kinds=(planted.Honest,), settings=SETTINGS):
    store = Store([Layer("explicit", root, writable=True)])
    registry = registry_of(*kinds)
    registry.use_store(store)
    return plan_warmup(MODEL, TP, [parse_case(c) for c in cases], tier=Tier.FULL, store=store, registry=registry,
                       settings=settings)  # fmt: skip


def printed(renderable) -> str:
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(renderable)
    return out.getvalue()


# ---- from a model to concrete calls


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_models_workload_is_a_valid_call_and_so_is_its_adversarial_twin(name):
    found = model(name)
    shard = found.shard(found.tensor_parallel[-1])
    for case in serving_cases(found, Tier.SMOKE):
        spec = concrete(shard, case)
        twin = adversarial_twin(spec)
        problem = describe(spec, "cpu")
        for one in (spec, twin):
            call = canonical_call(**make_inputs(one).kwargs)
            check_values(call)
            assert call.problem() == problem


@pytest.mark.parametrize("case", serving_cases(model(MODEL), Tier.FULL), ids=lambda c: c.name)
def test_the_twin_is_another_layout_of_the_same_problem(case):
    spec = concrete(model(MODEL).shard(1), case)
    twin = adversarial_twin(spec)
    assert describe(twin, "cpu") == describe(spec, "cpu")
    assert twin.tokens + twin.extra_rows == spec.tokens + spec.extra_rows
    assert adversarial_twin(spec) == twin, "a pure function of case and seed"
    if spec.n > 2:
        assert len(twin.padded) == 1
        assert twin.lengths[twin.padded[0]] > 0
    if spec.n >= 16:
        assert 0 in twin.lengths


def test_verification_reads_the_pool_and_writes_the_buffer_only():
    spec = concrete(model(MODEL).shard(1), parse_case("verify tree 4x8 bfloat16"))
    assert (spec.update, spec.verify, spec.state_dtype, spec.intermediate_dtype) == (
        "disabled",
        "tree",
        "bfloat16",
        "bfloat16",
    )


# ---- timing hooks


def test_rotated_calls_share_no_slot_and_keep_missing_ones_missing():
    case = with_room(CaseSpec("rotating", (1, 1, 1), k=8, v=8, padded=(1,)), 4)
    call = canonical_call(**make_inputs(case).kwargs)
    calls = rotated_calls(call, 4)
    assert len(calls) == 4
    named = [int(s) for c in calls for s in c.read_slots]
    assert Counter(named)[-1] == 4
    used = [s for s in named if s >= 0]
    assert len(set(used)) == len(used) == 8
    for c in calls:
        check_values(c)
        assert c.update == "in_place"
        assert c.problem() == call.problem()


def test_rotation_keeps_read_and_write_slots_apart():
    case = with_room(CaseSpec("separate", (1, 2), k=8, v=8, update="separate"), 3)
    calls = rotated_calls(canonical_call(**make_inputs(case).kwargs), 3)
    slots = torch.cat([torch.cat([c.read_slots, c.write_slots]) for c in calls])
    assert len(calls) == 3
    assert len(slots.unique()) == len(slots)


def test_bytes_moved_counts_each_input_and_result_once():
    case = CaseSpec("bytes", (2, 0, 1), h=1, hv=2, k=4, v=8, padded=(2,))  # one live slot: 2 * 4 * 8 * 4 B
    call = canonical_call(**make_inputs(case).kwargs)
    tokens = 3
    activations = 2 * tokens * (2 * 4 + 2 * 2 * 8 + 2 + 2)  # bfloat16: q, k; v and o; a and b
    assert bytes_moved(call) == activations + 2 * (2 * 4 * 8 * 4)
    assert state_bytes(case) == 3 * 2 * 4 * 8 * 4


# ---- plans


def test_a_plan_lists_problems_without_running_anything(tmp_path):
    plan = plan_at(tmp_path)
    assert [p.cases for p in plan.problems] == [("decode N=1",), ("verify 2x2",)]
    assert all(not p.known and p.candidates == 1 and p.estimate_s > 0 for p in plan.problems)
    assert not list(tmp_path.iterdir())
    assert "to tune" in printed(plan_table(plan))
    assert "2 of 2 problems to tune" in plan_summary(plan)


_PLAN = """
import sys
from pathlib import Path
from isokern import registry
from isokern.autotune.turns import Waiting, in_turn, ordered
from isokern.autotune.warmup import plan_warmup
from isokern.cache import Layer, Store
from isokern.cache.environment import Environment
from isokern.cache.silicon import CudaSilicon

h100 = Environment("cuda", CudaSilicon("9.0", 132, 80), 0, "13.0", (), "3.11")
registry.default.environment = lambda device: h100
store = Store([Layer("explicit", Path(sys.argv[1]), writable=True)])
plan = plan_warmup("qwen3-next-80b-a3b", 8, None, "cuda", store=store)
print(len(plan.problems), "torch" in sys.modules)
"""


def test_a_plan_for_a_gpu_needs_no_torch(tmp_path):
    """It takes seconds to load, and a warm-up that finds everything has no other use for it."""
    command = [sys.executable, "-c", _PLAN, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert int(told[0]) > 0
    assert told[1] == "False"


def test_cases_of_one_tuning_key_are_tuned_once_by_the_largest(tmp_path):
    plan = plan_at(tmp_path, ("decode N=5", "decode N=8", "decode N=7", "decode N=9"))
    assert [p.cases for p in plan.problems] == [("decode N=8", "decode N=7", "decode N=5"), ("decode N=9",)]


def test_layers_that_two_models_share_are_tuned_once(tmp_path):
    """Qwen3.5-35B has the heads of Qwen3-Next-80B; at TP 2 they are other problems."""
    store, registry = Store([Layer("explicit", tmp_path, writable=True)]), registry_of(planted.Honest)
    shards = shards_of(["qwen3-next-80b-a3b", "qwen3.5-35b-a3b"], [1, 2])
    plan = plan_shards(shards, [parse_case("decode N=8")], store=store, registry=registry, settings=SETTINGS)
    assert plan.shards == tuple((name, tp) for name in ("qwen3-next-80b-a3b", "qwen3.5-35b-a3b") for tp in (1, 2))
    assert [p.cases for p in plan.problems] == [
        (f"qwen3-next-80b-a3b TP {tp} decode N=8", f"qwen3.5-35b-a3b TP {tp} decode N=8") for tp in (1, 2)
    ]
    assert plan.title == "2 models, TP 1, 2"
    assert plan.arguments == "--model qwen3-next-80b-a3b --model qwen3.5-35b-a3b --tp 1 --tp 2"


def test_every_model_is_split_as_far_as_it_can_be():
    found = shards_of(["all"], [1, 2, 4, 8])
    assert {(one.name, tp) for one, tp in found} == {
        (one.name, tp) for one in catalogue().values() for tp in one.tensor_parallel if tp <= 8
    }
    assert shards_of([MODEL, MODEL.upper()], [TP, TP]) == shards_of([MODEL], [TP]), "named twice, planned once"


@pytest.mark.parametrize(("models", "sizes"), [([MODEL], [1, 3]), ([MODEL], [3]), ([MODEL, "olmo-hybrid-7b"], [3])])
def test_a_size_that_the_only_model_or_one_of_several_cannot_have_is_refused(models, sizes):
    with pytest.raises(CatalogueError, match="3 ranks"):
        shards_of(models, sizes)


def test_an_unknown_one_among_several_models_is_named():
    with pytest.raises(UnknownNameError, match="qwen3-next"):
        shards_of([MODEL, "qwen3-next-80b"], [1])


def test_what_cannot_be_planned_is_a_typed_error(tmp_path):
    with pytest.raises(UnknownNameError, match="qwen3-next"):
        plan_warmup("qwen3-next-80b")
    with pytest.raises(CatalogueError, match="3 ranks"):
        plan_warmup(MODEL, 3)
    with pytest.raises(ArgumentValueError, match="device"):
        plan_warmup(MODEL, device="tpu")
    cases = [parse_case("decode N=1")]
    with pytest.raises(ArgumentValueError, match=r"tier: expected one that a case .* is in, given smoke; .* full"):
        plan_warmup(MODEL, TP, cases, tier=Tier.SMOKE, store=Store([Layer("explicit", tmp_path, writable=True)]))


def test_estimates_follow_what_earlier_runs_took(tmp_path):
    plan = plan_at(tmp_path)
    task = plan.problems[0].task
    guess = CostModel(1.0, "").seconds(task, 4)

    earlier = SimpleNamespace(measured={"seconds": 3 * guess}, candidates=(None,) * 4)
    learned = CostModel.calibrated("cpu", [(task, earlier)])
    assert learned.scale == pytest.approx(3.0)
    assert "earlier" in learned.source


def test_what_another_launch_mode_has_proven_costs_no_references(tmp_path):
    task = plan_at(tmp_path, ("prefill 1x1024",)).problems[0].task
    first, second = (CostModel(1.0, "").seconds(task, 60, proven=proven) for proven in (False, True))
    assert second < first


def test_graphs_are_tuned_while_kernels_are_compiled_and_the_rest_afterwards():
    whole = warmup_seconds([10.0, 10.0], [5.0, 5.0], 15.0, 100.0)
    assert 100.0 + 10.0 + 10.0 < whole < 15.0 + 100.0 + 10.0 + 10.0
    without = warmup_seconds([10.0, 10.0], [5.0, 5.0], 15.0, 0.0)
    assert 15.0 + 20.0 + 10.0 < without < whole
    assert warmup_seconds([], [], 15.0, 0.0) == 0.0


def test_kernels_that_are_there_are_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr("isokern.autotune.cost.directory", lambda: tmp_path)
    work = [None] * 40
    nothing_there = compile_seconds(work)
    (tmp_path / "cupy").mkdir()
    estimates = []
    for there in (20, 40, 60):
        for number in range(there):
            (tmp_path / "cupy" / f"{number}.json").touch()
        estimates.append(compile_seconds(work))
    assert nothing_there > estimates[0] > estimates[1] == estimates[2] > 0
    assert compile_seconds([]) == 0.0


def test_a_dry_run_promises_what_the_plan_estimates(tmp_path):
    plan = replace(plan_at(tmp_path), compile_s=1000.0)
    assert plan.estimate_s > 1000.0
    assert f"about {format_duration(plan.estimate_s)}" in plan_summary(plan)


# ---- what is tuned when


class Crew:
    """Compilers whose work is done step by step: each wait ends with the next problem's."""

    def __init__(self, *order):
        self.order = list(order)
        self.done = []
        self.failures = []

    @property
    def idle(self):
        return not self.order

    def ready(self, fields):
        return next((i for i, (task, _) in enumerate(fields) if task in self.done), None)

    def first_ready(self, fields):
        while self.ready(fields) is None:
            self.done.append(self.order.pop(0))
        return self.ready(fields)

    def wait(self):
        self.done += self.order
        self.order.clear()


def waiting(name, mode):
    task = SimpleNamespace(name=f"{name} {mode}", recipe=SimpleNamespace(mode=mode))
    return Waiting(SimpleNamespace(task=task), (task, ()))


def test_a_budget_is_for_the_most_valuable_else_the_longest_are_compiled_first():
    def planned(mode, seconds):
        return SimpleNamespace(known=False, estimate_s=seconds, task=SimpleNamespace(recipe=SimpleNamespace(mode=mode)))

    first, second, eager = planned("graph", 1.0), planned("graph", 2.0), planned("eager", 3.0)
    on_gpu = SimpleNamespace(problems=(eager, first, second), environment=SimpleNamespace(device="cuda"))
    assert ordered(on_gpu, longest_first=True) == [second, first, eager]
    assert ordered(on_gpu, longest_first=False) == [first, second, eager]
    on_cpu = SimpleNamespace(problems=(first, second), environment=SimpleNamespace(device="cpu"))
    assert ordered(on_cpu, longest_first=True) == [first, second]


def test_by_graph_whatever_is_compiled_and_the_rest_when_all_is():
    a, b, c, eager = waiting("a", "graph"), waiting("b", "graph"), waiting("c", "graph"), waiting("a", "eager")
    crew = Crew(b.field[0], eager.field[0], a.field[0], c.field[0])
    steps = Steps()
    turns = in_turn([a, b, c, eager], crew, steps)
    assert next(turns) is b.planned, "the first that is ready"
    crew.wait()
    assert list(turns) == [a.planned, c.planned, eager.planned], "then in order"
    assert steps.seen == [("stage", "compile")]


def test_what_counts_the_hosts_time_waits_for_all_compilers():
    a, b, eager = waiting("a", "graph"), waiting("b", "graph"), waiting("a", "eager")
    crew = Crew(eager.field[0], a.field[0], b.field[0], "another's")
    crew.failures.append("kernel: no such instruction")
    steps = Steps()
    seen = [(planned, crew.idle) for planned in in_turn([a, b, eager], crew, steps)]
    assert seen == [(a.planned, False), (b.planned, False), (eager.planned, True)]
    assert crew.failures == []


# ---- runs


class Steps(Progress):
    def __init__(self):
        self.seen = []

    def begin(self, problem, index, total):
        self.seen.append(("begin", problem, index, total))

    def stage(self, name, steps):
        self.seen.append(("stage", name))

    def end(self, problem, outcome, seconds):
        self.seen.append(("end", problem, outcome))


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    root = tmp_path_factory.mktemp("warm")
    plan = plan_at(root, kinds=(planted.Honest, planted.FastAndWrong))
    steps = Steps()
    return root, steps, run_warmup(plan, steps)


def test_a_warm_up_publishes_and_proves_every_problem(warm):
    _, steps, report = warm
    assert report.ok, report.errors
    assert [p.entry.backend for p in report.problems] == ["honest", "honest"]
    assert all(p.proof is not None and p.proof.ok for p in report.problems)
    assert report.problems[0].rejected == {"wrong": 1}
    assert steps.seen[:3] == [("begin", "decode N=1", 0, 2), ("stage", "first calls"), ("stage", "gate")]
    assert steps.seen[-1] == ("end", "verify 2x2", "honest[default]")


def test_the_report_is_readable(warm):
    _, _, report = warm
    table = printed(report_table(report))
    assert "decode N=1" in table
    assert "honest[default]" in table
    assert "1 wrong" in table
    summary = report_summary(report)
    assert "2 tuned, 0 known, 2 proven" in summary
    assert str(report.plan.store_path) in summary


def test_a_second_run_finds_everything_and_starts_no_process(warm):
    root, _, first = warm
    plan = plan_at(root, kinds=(planted.Honest, planted.FastAndWrong))
    assert all(p.known for p in plan.problems)
    assert plan.estimate_s == 0
    again = run_warmup(plan)
    assert again.workers == 0
    assert [p.entry for p in again.problems] == [p.entry for p in first.problems]
    assert "all 2 problems are known" in plan_summary(plan)


def test_a_spent_budget_skips_problems_and_says_so(tmp_path):
    report = run_warmup(plan_at(tmp_path), budget_s=0.0)
    assert [p.cases[0] for p in report.skipped] == ["decode N=1", "verify 2x2"]
    assert report.workers == 0
    assert "2 not reached" in report_summary(report)


class AsOnGpu:
    """The environment of a CPU that passes for a GPU's."""

    device = "cuda"

    def __init__(self, here):
        self.here = here

    def __getattr__(self, name):
        return getattr(self.here, name)


def test_on_a_gpu_compilers_and_all_workers_are_set_off_before_the_first_problem(tmp_path, monkeypatch):
    compiled, begun = [], []
    monkeypatch.setattr(Compilers, "submit", lambda crew, work: compiled.extend(w.candidate.name for w in work))
    begin = Worker.begin
    monkeypatch.setattr(Worker, "begin", lambda worker: (begun.append(worker), begin(worker))[1])

    class Begins(Steps):
        def begin(self, problem, index, total):
            super().begin(problem, index, total)
            assert (len(compiled), len(begun)) == (1, 3)

    steps = Begins()
    plan = plan_at(tmp_path, ("decode N=1",))
    report = run_warmup(replace(plan, environment=AsOnGpu(plan.environment)), steps, compilers=2)
    assert steps.seen[0] == ("begin", "decode N=1", 0, 1)
    assert report.ok
    assert [p.proof.ok for p in report.problems] == [True]
    assert report.workers == 3, "the one that proves is the third that was begun"
    assert not any(worker.alive for worker in begun)


def test_a_problem_without_a_winner_fails_alone(tmp_path):
    plan = plan_at(tmp_path, ("decode N=1",), kinds=(planted.FailsToBind,))
    report = run_warmup(plan)
    assert not report.ok
    assert "ptxas" in report.errors[0]
    assert "no candidate is proven" in printed(report_table(report))


def test_what_rounds_is_tuned_under_the_policy_alone_and_by_its_own_bound(tmp_path, monkeypatch):
    # What the workers inherit does not decide for them.
    monkeypatch.setenv("ISOKERN_ACCURACY_FUSED_SIGMOID_GATING", "rounded")
    case = parse_case("decode N=1")
    cases = (case, replace(case, name="decode N=1 rounded", accuracy="rounded"))
    registry, store = registry_of(planted.Sluggish, planted.Rounding), Store([Layer("explicit", tmp_path, True)])
    registry.use_store(store)
    plan = plan_warmup(MODEL, TP, cases, tier=Tier.FULL, store=store, registry=registry, settings=SETTINGS)
    report = run_warmup(plan)
    assert report.ok, report.errors  # a fresh process dispatches each under its policy
    assert [p.entry.backend for p in report.problems] == ["sluggish", "rounding"]
    assert [p.rejected["policy"] for p in report.problems] == [1, 0]
    assert all(p.proof is not None and p.proof.ok for p in report.problems)
    kwargs = make_inputs(report.problems[0].planned.task.recipe.case).kwargs
    for policy, chosen in (("float32", "sluggish"), ("rounded", "rounding")):
        with use(OP, accuracy=policy):
            assert (found := registry.get(OP).decide(**kwargs)).rule is Rule.TUNED_USER
        assert found.backend == chosen


# ---- interruption

_RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tests_of_warmup", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["tests_of_warmup"] = module
spec.loader.exec_module(module)
module.run_until_interrupted(sys.argv[1])
"""


def run_until_interrupted(root: str) -> None:
    class Announcing(Progress):
        def stage(self, name, steps):
            print("stage", name, flush=True)

    settings = replace(SETTINGS, policy=replace(SETTINGS.policy, screen=ScreenPolicy(first_samples=1000)))
    plan = plan_at(Path(root), ("decode N=1",), kinds=(planted.Sluggish,), settings=settings)
    try:
        run_warmup(plan, Announcing())
    except Interrupted as interrupted:
        children = psutil.Process().children(recursive=True)
        print("interrupted", interrupted.signal.name, len(children), flush=True)


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_ends_the_workers_and_raises_interrupted(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN.format(file=__file__), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.strip() == "stage screen":
            time.sleep(0.3)
            os.kill(process.pid, number)
    assert process.wait(30) == 0
    assert lines[-1] == f"interrupted {number.name} 0"


def test_one_tuner_at_a_time_on_a_device(tmp_path):
    code = (
        "from isokern.autotune.device_lock import device_lock\n"
        "with device_lock('test-device', lambda text: print(text, flush=True)):\n    print('held', flush=True)\n"
    )
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    with device_lock("test-device", pytest.fail):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        assert "waiting" in process.stdout.readline()
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    assert process.wait(30) == 0


def test_durations_are_for_people():
    assert [format_duration(s) for s in (0.4, 12.2, 59.7, 330, 7320)] == [
        "0.4 s",
        "12 s",
        "1 min 00 s",
        "5 min 30 s",
        "2 h 02 min",
    ]


def test_graphs_are_not_planned_for_a_cpu():
    """The dry run would promise what the run cannot do."""
    with pytest.raises(ArgumentValueError, match="policy: expected eager on a CPU, which has no graphs, given graph"):
        plan_warmup("qwen3-next-80b-a3b", 8, [parse_case("decode N=1")], "cpu", policies=[Policy.GRAPH])
