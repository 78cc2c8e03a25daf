"""The GPU test tool as far as it goes without a GPU: plans, processes, reports, logs, judging, comparisons."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import isokern
from isokern import registry
from isokern.registry.backend import Config
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.tools.gpu_test import (
    calls,
    cells,
    cli,
    configs,
    examine,
    far,
    limits,
    machine,
    plan,
    properties,
    sanitized,
    sanitizer,
)
from isokern.tools.gpu_test import fingerprint as fingerprints
from isokern.tools.gpu_test import session as sessions
from isokern.tools.gpu_test.cases import CONFIG_CASES, REPRESENTATIVE, SANITIZED
from isokern.tools.gpu_test.cells import Cell, make_calls, select
from isokern.tools.gpu_test.conformity import Truth
from isokern.tools.gpu_test.fingerprint import fingerprint
from isokern.tools.gpu_test.perform import perform as perform_task
from isokern.tools.gpu_test.report import Report, timing_row
from isokern.tools.gpu_test.task import Budget, Outcome, Result, Task
from isokern.tools.gpu_test.timing import launches_for
from isokern.tools.gpu_test.workers import work_off

ROOT = Path(isokern.__file__).parent
OP = "fused_sigmoid_gating"
HERE = machine.Machine("Test GPU", 90, "13.0")


def backend(name: str):
    return registry.backends(OP)[name]


def report(path: Path | None = None, version: str = "1") -> Report:
    return Report(path, {"date": "2026-01-01"}, lambda stage, who: f"{stage} {who} {version}")


# --- command line -----------------------------------------------------------------------------------------------------


def test_without_a_cuda_device_it_says_so_in_one_line_and_exits_with_2(monkeypatch):
    monkeypatch.setattr(machine, "find", lambda: None)
    done = CliRunner().invoke(cli.app, ["suite"])
    assert done.exit_code == 2
    assert done.output.strip() == "no CUDA device"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweet"], "sweet: expected any of suite, configs, properties, sanitizer, bench"),
        (["bench", "--cells", "N=999"], "cells is called so"),
        (["bench", "--cells", "("], "--cells"),
        (["bench", "--sglang", "/nowhere"], "holds no package sglang"),
        (["suite", "--backend", "fortran"], "fortran: expected any of"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(monkeypatch, words, message):
    monkeypatch.setattr(machine, "find", lambda: HERE)
    done = CliRunner().invoke(cli.app, words, env={"COLUMNS": "300"})
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_a_backend_whose_framework_is_missing_is_an_error_and_never_skipped(monkeypatch):
    monkeypatch.setattr(cli, "missing_modules", lambda backend: ("cupy",))
    with pytest.raises(cli.typer.BadParameter, match="torch_vectorized needs cupy"):
        cli.chosen_backends(["torch_vectorized"], HERE)


def test_every_gpu_language_is_chosen_by_default():
    assert {b.name for b in cli.chosen_backends(None, HERE)} >= {"cupy", "numba_cuda", "triton"}


def test_the_whole_run_from_plan_to_exit_status(monkeypatch, tmp_path):
    """With tasks performed by a stand-in: every stage's tasks come, compiling first, cells alone."""
    seen: list[tuple[int, Task]] = []

    def work(tasks, jobs, budget):
        for task in tasks:
            seen.append((jobs, task))
            rows = tuple(
                timing_row(task.case, n, graph_us=2.0, floor_us=1.0, status="pass") for n in task.implementations
            )
            yield task, Result(Outcome.PASS, rows=rows)

    monkeypatch.setattr(machine, "find", lambda: HERE)
    monkeypatch.setattr(cli, "work_off", work)
    out = tmp_path / "out.json"
    words = ["--backend", "torch_vectorized", "--jobs", "7", "--out", str(out), "--cells", "^decode N=1 "]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert {(jobs, task.stage) for jobs, task in seen} == {
        *((7, stage) for stage in ("compile", "suite", "configs", "properties", "sanitizer")),
        (1, "bench"),
    }
    count = len(seen)
    again = CliRunner().invoke(cli.app, words)
    assert again.exit_code == 0
    assert len(seen) == count, "what passed is not run again"
    data = json.loads(out.read_text())
    assert data["meta"]["gpu"] == "Test GPU"
    assert len([r for r in data["rows"] if r["graph_us"]]) == len(select("^decode N=1 ", quick=False))


# --- plans ------------------------------------------------------------------------------------------------------------


def test_only_the_stages_asked_for_are_planned():
    both = [backend("torch_vectorized"), backend("torch_chunked")]
    for stage in ("suite", "configs", "properties", "sanitizer"):
        assert {task.stage for task in plan.check_tasks([stage], both, ["N1"])} == {stage}
    assert plan.check_tasks(["bench"], both, ["N1"]) == []


def test_only_x1_is_given_peers_to_hand_states_to():
    both = [backend("torch_vectorized"), backend("torch_chunked")]
    peers = {(t.what[0], t.subject): t.what[1] for t in plan.check_tasks(["suite"], both, ["N1", "X1"])}
    assert peers["X1", "torch_vectorized"] == ("torch_chunked",)
    assert peers["N1", "torch_vectorized"] == ()


def test_every_row_of_a_plan_has_a_name_of_its_own():
    both = [backend("torch_vectorized"), backend("torch_chunked")]
    tasks = plan.check_tasks(["suite", "configs", "properties", "sanitizer"], both, ["N1", "X1"])
    tasks += plan.bench_tasks(cells.CELLS, both, Path("there"))
    keys = [key for task in tasks for key in task.keys]
    assert len(keys) == len(set(keys))


def test_cells_that_share_kernels_compile_them_once():
    one = [backend("torch_vectorized")]
    decode = [cell for cell in cells.CELLS if cell.kind == (16, 32, "float32", "vk", True)]
    assert len(decode) == 5
    wanted = {config for cell in decode for config in one[0].configs(cell.problem(90))}
    tasks = plan.compile_for_cells(decode, one, 90)
    assert [task.what[1] for task in tasks] == list(dict.fromkeys(task.what[1] for task in tasks))
    assert {task.what[1] for task in tasks} == wanted


def test_a_short_bench_takes_the_first_configs_of_each_backend():
    one, cell = backend("numba_cuda"), cells.CELLS[0]
    offered = one.configs(cell.problem(90))
    compiled = plan.compile_for_cells([cell], [one], 90, 2)
    assert [task.what[1] for task in compiled] == list(offered[:2])
    assert [task.what[-1] for task in plan.bench_tasks([cell], [one], None, 2)] == [2]


def test_sglang_is_timed_only_in_its_own_layout():
    for task in plan.bench_tasks(cells.CELLS, [backend("torch_vectorized")], Path("there")):
        assert ("sgl_triton" in task.implementations) == (task.what[0].layout == "vk")


# --- processes --------------------------------------------------------------------------------------------------------

PERFORM = """
import os, time
from isokern.tools.gpu_test.task import Outcome, Result
def perform(task):
    match task.what:
        case "raise": raise RuntimeError("no such luck")
        case "die": os._exit(7)
        case "threads":
            import torch
            return Result(Outcome.PASS, note=f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
        case "hang": time.sleep(600)
        case "fault": return Result.of(["wrong"], str(os.getpid()))
    return Result(Outcome.PASS, note=str(os.getpid()))
"""


@pytest.fixture
def perform(tmp_path, monkeypatch):
    (tmp_path / "stand_in_for_perform.py").write_text(PERFORM)
    monkeypatch.syspath_prepend(tmp_path)
    return "stand_in_for_perform:perform"


def test_a_process_computes_with_one_thread_as_there_are_as_many_as_cores(perform):
    [(_, result)] = work_off([Task("suite", "a", "threads", "threads")], 1, Budget(None), perform)
    assert result.note == "1 1"


def test_a_process_that_failed_is_replaced_and_the_others_tasks_go_on(perform):
    whats = ["fine", "raise", "fine", "die", "fault", "fine", "fine"]
    tasks = [Task("suite", str(i), what, what) for i, what in enumerate(whats)]
    results = {task.subject: result for task, result in work_off(tasks, 1, Budget(None), perform)}
    assert [results[str(i)].outcome is Outcome.PASS for i in range(7)] == [w == "fine" for w in whats]
    assert "RuntimeError: no such luck" in results["1"].faults[0]
    assert results["3"].faults == ("the process ended with status 7",)
    # One process as long as tasks pass; another after each failure.
    assert results["5"].note == results["6"].note
    assert len({results[i].note for i in ("0", "2", "4", "5")}) == 4


def test_a_task_that_hangs_fails_after_its_limit(perform):
    tasks = [Task("suite", "a", "hang", "hang", limit=0.2), Task("suite", "b", "fine", "fine")]
    results = {task.subject: result for task, result in work_off(tasks, 1, Budget(60.0), perform)}
    assert results["a"].faults == ("no answer after 0.2 s",)
    assert results["b"].outcome is Outcome.PASS


def test_when_the_budget_is_spent_what_runs_is_ended_and_the_rest_is_not_run(perform):
    tasks = [Task("suite", name, what, what) for name, what in (("a", "hang"), ("b", "fine"))]
    results = list(work_off(tasks, 1, Budget(0.5), perform))
    assert [(task.subject, result.outcome) for task, result in results] == [
        ("a", Outcome.NOT_RUN),
        ("b", Outcome.NOT_RUN),
    ]


def test_nothing_starts_without_budget(perform):
    now = [0.0]
    budget = Budget(1.0, lambda: now[0])
    now[0] = 2.0
    results = list(work_off([Task("suite", "a", "fine", "fine")], 1, budget, perform))
    assert [result.outcome for _, result in results] == [Outcome.NOT_RUN]


def test_a_task_that_no_stage_knows_is_an_error():
    with pytest.raises(ValueError, match="no such task"):
        perform_task(Task("suite", "torch_vectorized", "?", 3))


def test_fingerprints_tell_stages_backends_sources_and_gpus_apart():
    one = partial(fingerprint, op=OP)
    same = [one("suite", "torch_vectorized", gpu="A") for _ in range(2)]
    assert same[0] == same[1]
    others = [
        one("configs", "torch_vectorized", gpu="A"),
        one("suite", "torch_vectorized", gpu="B"),
        one("suite", "triton", gpu="A"),
        one("bench", "sgl_triton", gpu="A"),
    ]
    assert len({same[0], *others}) == 5


def test_every_file_that_makes_results_is_in_their_fingerprints():
    own = {name for names in fingerprints._OWN.values() for name in names}
    reporting = "__init__ __main__ cli fingerprint limits machine perform plan report session task workers".split()
    there = {file.name for file in (ROOT / "tools" / "gpu_test").glob("*.py")}
    assert there - own == {f"{name}.py" for name in reporting}
    assert own <= there


# --- reports ----------------------------------------------------------------------------------------------------------


def test_rows_have_the_columns_of_all_results_files():
    spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "record.py")
    record = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["record"] = record
    spec.loader.exec_module(record)
    assert list(timing_row("case", "cupy")) == [field.name for field in fields(record.Row)]


def test_a_killed_run_loses_nothing_and_is_resumed_where_it_ended(tmp_path):
    path = tmp_path / "new" / "r.json"
    passed, failed, later = (Task("suite", "cupy", name) for name in ("suite N1", "suite N2", "suite N3"))
    first = report(path)
    first.add(passed, Result(Outcome.PASS, counts={"pass": 3}))
    first.add(failed, Result.of(["N2 is off"]))  # and here it was killed
    second = report(path)
    assert second.resume() == 0
    assert [second.passed(task) for task in (passed, failed, later)] == [True, False, False]
    second.add(failed, Result(Outcome.PASS))
    data = json.loads(path.read_text())
    assert [(row["case"], row["extra"]["status"]) for row in data["rows"]] == [
        ("suite N1", "pass"),
        ("suite N2", "pass"),
    ]
    assert data["rows"][0]["extra"]["counts"] == {"pass": 3}
    assert data["meta"]["failed"] == []
    assert not list(path.parent.glob("*.tmp"))


def test_rows_of_other_sources_are_dropped(tmp_path):
    path = tmp_path / "r.json"
    task = Task("suite", "cupy", "suite N1")
    report(path).add(task, Result(Outcome.PASS))
    changed = report(path, version="2")
    assert changed.resume() == 1
    assert not changed.passed(task)


def test_a_cell_is_done_only_when_every_implementation_has_its_row(tmp_path):
    cell = Task("bench", "all", "decode", implementations=("cupy", "sgl_triton"))
    made = report(tmp_path / "r.json")
    made.add(cell, Result(Outcome.PASS, rows=(timing_row("decode", "cupy", graph_us=1.0, status="pass", faults=[]),)))
    assert made.passed(cell), "a row that a cell did not make stands for its result"
    other = replace(cell, implementations=("cupy", "triton"))
    assert not made.passed(other)


def test_a_row_of_a_cell_says_itself_whether_it_passed():
    made = report()
    rows = (
        timing_row("decode", "cupy", graph_us=1.0, status="pass", faults=[]),
        timing_row("decode", "triton", graph_us=1.0, status="fail", faults=["off"]),
    )
    cell = Task("bench", "all", "decode", implementations=("cupy", "triton"))
    made.add(cell, Result(Outcome.FAIL, ("triton off",), rows=rows))
    assert [row["implementation"] for row in made.failures] == ["triton"]


def test_only_compiling_that_failed_makes_a_row():
    made = report()
    made.add(Task("compile", "cupy", "a [x=1]"), Result(Outcome.PASS))
    made.add(Task("compile", "cupy", "b [x=1]"), Result.of(["does not compile"]))
    assert [row["case"] for row in made.rows.values()] == ["b [x=1]"]


def test_a_file_that_is_no_report_is_refused(tmp_path):
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match="no results file"):
        report(tmp_path / "r.json").resume()


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([Outcome.PASS, Outcome.SKIPPED], sessions.EXIT_OK),
        ([Outcome.PASS, Outcome.NOT_RUN], sessions.EXIT_INCOMPLETE),
        ([Outcome.NOT_RUN, Outcome.FAIL], sessions.EXIT_FAILED),
    ],
)
def test_exit_status_and_what_is_said(outcomes, status):
    tasks = [Task("suite", "cupy", f"suite N{i}") for i in range(len(outcomes))]
    said: list[str] = []
    made = report()

    def work(tasks, jobs, budget):
        yield from (
            (task, Result(outcome, ("off",) if outcome is Outcome.FAIL else ()))
            for task, outcome in zip(tasks, outcomes, strict=False)
        )

    assert sessions.conduct(sessions.Plan(tasks, []), 2, Budget(None), made, work, said.append) == status
    text = "\n".join(said)
    for task, outcome in zip(tasks, outcomes, strict=True):
        if outcome is Outcome.FAIL:
            assert f"FAILED suite cupy {task.case}" in text
        if outcome is Outcome.NOT_RUN:
            assert task.label in made.not_run
            assert f"NOT RUN for lack of budget (1): {task.label}" in text


# --- sanitizers -------------------------------------------------------------------------------------------------------

CLEAN = """\
========= COMPUTE-SANITIZER
gdn vk, padding: ok
calls made: 12
========= ERROR SUMMARY: 0 errors
"""
OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at recurrent+0x2d0
=========     by thread (31,0,0) in block (7,0,0)
=========     Address 0x9a0000000000 is out of bounds
=========     and is 10,485,760 bytes after the nearest allocation at 0x7f2000000000 of size 2,048 bytes
=========
Traceback (most recent call last):
RuntimeError: CUDA error: unspecified launch failure
========= Target application returned an error
========= ERROR SUMMARY: 32 errors
========= ERROR SUMMARY: 12 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at recurrent+0x9d0
=========     and Read access at recurrent+0xa10 [64 hazards]
=========
calls made: 12
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CUT = "========= COMPUTE-SANITIZER\ngdn vk, padding: ok\n"

TOOL = sanitizer.Run("memcheck", "memcheck")
PLANTED = sanitizer.Run("planted", "memcheck", "slots")


def test_a_clean_and_complete_log_passes():
    assert sanitizer.judged(TOOL, sanitizer.read_log(CLEAN), 0).outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("log", "fault"),
    [
        (OUT_OF_BOUNDS, "Invalid __global__ read of size 16 bytes (at recurrent+0x2d0)"),
        (RACE, "Error: Race reported between Write access at recurrent+0x9d0"),
        (CUT, "no summary: the sanitizer did not come to its end"),
        (CUT, "the program did not come to its end"),
        (CLEAN.replace(": 0 errors", ": 3 errors"), "3 errors"),
    ],
)
def test_what_a_log_reports_is_a_fault(log, fault):
    result = sanitizer.judged(TOOL, sanitizer.read_log(log), 0)
    assert result.outcome is Outcome.FAIL
    assert fault in result.faults


def test_results_outside_their_bound_fail_though_the_sanitizer_is_content():
    assert sanitizer.judged(TOOL, sanitizer.read_log(CLEAN), 1).faults == ("exit status 1",)


def test_a_planted_error_has_to_be_reported():
    assert sanitizer.judged(PLANTED, sanitizer.read_log(OUT_OF_BOUNDS), 1).outcome is Outcome.PASS
    silent = sanitizer.judged(PLANTED, sanitizer.read_log(CLEAN), 0)
    assert silent.faults == ("the planted error was not reported: the tool does not see the kernel",)


def test_without_a_sanitizer_only_the_programs_own_end_counts():
    log = "gdn vk, padding: ok\ncalls made: 12\n"
    assert sanitizer.judged(sanitizer.PLAIN, sanitizer.read_log(log), 0).outcome is Outcome.PASS


def test_a_moved_storage_keeps_views_strides_and_gaps():
    row = torch.arange(24, dtype=torch.float32).view(4, 6)
    transfer = sanitized.Transfer("cpu")
    left, right = transfer(row[:, :2]), transfer(row[1:, 3:])
    assert torch.equal(left, row[:, :2])
    assert torch.equal(right, row[1:, 3:])
    assert right.stride() == (6, 1)
    assert left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr() != row.data_ptr()


@pytest.mark.parametrize("spec", [s for s in sanitized.SANITIZED if "K=V=256" not in s.name], ids=lambda s: s.name)
def test_the_sanitizers_calls_are_right_when_nothing_but_copies_fills_their_tensors(spec):
    assert sanitized.run_case("torch_reference", spec, device="cpu") == ()


@pytest.mark.parametrize(
    "listed", [CONFIG_CASES, REPRESENTATIVE, SANITIZED], ids=["configs", "properties", "sanitizers"]
)
@pytest.mark.parametrize(
    "name", ["cupy_chunked", "cupy_chunked_bf16", "cupy_cut", "cupy_cut_bf16", "triton_chunked"]
)  # fmt: skip
def test_what_works_in_chunks_has_several_and_what_cuts_several_segments(name, listed):
    """Else pipelines are never refilled, and what segments leave each other is never read."""
    chunked, chunks, segments = backend(name), 0, []
    for spec in listed:
        problem = describe(spec, "cuda", 90)
        if not chunked.check(problem):
            continue
        for config in chunked.configs(problem):
            longest, setting = max(spec.lengths), config.to_dict()
            chunks = max(chunks, -(-longest // setting["chunk"]) - setting.get("stages", 1))
            segments.append(-(-longest // cut) if (cut := setting.get("cut")) else 1)
    assert chunks > 0, "more chunks than are in flight"
    assert max(segments) >= (3 if chunked.cuts else 1)


# --- what is examined on the GPU, on the CPU --------------------------------------------------------------------------


class Wrapped(registry.Backend):
    """A backend whose runner is wrapped; everything else is the inner backend's."""

    def __init__(self, inner, around):
        self.inner, self.around = inner, around
        self.op, self.name, self.provenance = inner.op, inner.name, inner.provenance
        self.tags, self.accuracy = inner.tags | {"capture_safe"}, inner.accuracy

    def check(self, problem):
        return self.inner.check(problem)

    def configs(self, problem):
        return self.inner.configs(problem)

    def bind(self, problem, config):
        return partial(self.around, self.inner.bind(problem, config), config)


def honest(run, config, call):
    return run(call.replace())  # a copy: a CPU call remembers its offsets, a GPU kernel reads them


class Closure:
    """Instead of a graph: launches again what was captured. Capturing launches once, to no effect on what follows."""

    def __init__(self, launch):
        launch()
        self.replay = launch


SHORT = CaseSpec("small", (3, 0, 2, 1), k=16, v=8, padded=(3,))


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls on the CPU, graphs that launch again what was captured, a "far" that fits."""
    for module in (examine, far, configs):
        monkeypatch.setattr(module, "call_of", partial(calls.call_of, device="cpu"))
    monkeypatch.setattr(examine, "inputs_of", partial(calls.inputs_of, device="cpu"))
    monkeypatch.setattr(examine, "capture", Closure)
    monkeypatch.setattr(far, "_BEYOND", 2**22)
    monkeypatch.setattr(examine, "REPRESENTATIVE", (SHORT, SHORT.but(name="tree", verify="tree")))
    monkeypatch.setattr(far, "_SPEC", far._SPEC.but(lengths=(3, 0, 2), h=1, hv=2, k=16, v=8))


EXAMINED = {
    "replayed": examine.replayed,
    "layers": examine.layers,
    "odd size": partial(examine.odd_size, k=3, v=3),
    "pool": far.pool,
    "intermediates": far.intermediates,
    "rows": far.rows,
}


@pytest.mark.parametrize("name", EXAMINED)
def test_an_honest_backend_has_every_property(on_cpu, monkeypatch, name):
    monkeypatch.setattr(far, "_BEYOND", 2**16)
    if name == "rows":
        monkeypatch.setattr(far, "_SPEC", far._SPEC.but(lengths=(9, 0, 5)))
    assert list(EXAMINED[name](Wrapped(backend("torch_vectorized"), honest))) == []


def test_what_a_backend_declines_is_skipped_with_its_reason(on_cpu, monkeypatch):
    chunked = Wrapped(backend("torch_chunked"), honest)
    told = configs.examine_configs(chunked, SHORT.but(name="tree", verify="tree"))
    assert told.outcome is Outcome.SKIPPED
    assert "after each of its tokens" in told.note
    assert configs.examine_configs(chunked, SHORT).outcome is Outcome.PASS, "held to the bound of chunked forms"
    assert list(calls.able(chunked, examine.REPRESENTATIVE, examine.call_of)) == [SHORT]
    with pytest.raises(calls.NotApplicableError, match="after each of its tokens"):
        list(calls.able(chunked, [SHORT.but(name="tree", verify="tree")], examine.call_of))
    monkeypatch.setattr(far, "_BEYOND", 2**16)
    assert properties.examine_property(chunked, "intermediate states beyond 2**31 elements").outcome is Outcome.SKIPPED


def reads_slots_once(seen):
    """Takes a call's slots as they were when it was first launched: what a capture that reads them on the host does."""

    def around(run, config, call):
        _, slots = seen.setdefault(id(call), (call, call.read_slots.clone()))
        return run(call.replace(read_slots=slots))

    return around


def reads_slots_for_good(seen):
    """The same by the address of the slots, which layers share."""

    def around(run, config, call):
        _, slots = seen.setdefault(call.read_slots.data_ptr(), (call, call.read_slots.clone()))
        return run(call.replace(read_slots=slots))

    return around


def off_by_a_slot(run, config, call):
    """Writes beside what it was told: a slot that nobody named."""
    out = run(call)
    if call.pool.shape[0] > 64:
        call.pool[0] += 1
    return out


def inaccurate(run, config, call):
    out = run(call)
    out *= 1.02
    return out


@pytest.mark.parametrize(
    ("name", "around", "message"),
    [
        ("replayed", reads_slots_once({}), "other bits than an eager call"),
        ("layers", reads_slots_for_good({}), "the graph leaves other results than an eager call"),
        ("pool", off_by_a_slot, "a slot that no sequence names has changed"),
        ("odd size", inaccurate, "gdn kv: output is"),
    ],
)
def test_a_backend_without_the_property_is_found_out(on_cpu, monkeypatch, name, around, message):
    monkeypatch.setattr(far, "_BEYOND", 2**16)
    found = list(EXAMINED[name](Wrapped(backend("torch_vectorized"), around)))
    assert any(message in fault for fault in found), found


def test_a_config_with_other_bits_or_beyond_the_bound_is_found_out(on_cpu, monkeypatch):
    spec = CaseSpec("small", (3, 0, 2, 1), k=16, v=8, io_dtype="float32")

    def second_is(change):
        def around(run, config, call):
            out = run(call)
            if config != configs_of[0]:
                change(out)
            return out

        return Wrapped(backend("torch_vectorized"), around)

    configs_of = backend("torch_vectorized").configs(calls.call_of(spec, device="cpu").problem())
    assert len(configs_of) > 1
    assert configs.examine_configs(second_is(lambda out: None), spec).outcome is Outcome.PASS

    def nudge(out):
        out.view(torch.int32)[0, 0, 0, 0] += 1

    assert configs.examine_configs(second_is(nudge), spec).outcome is Outcome.PASS, "no such promise was made"
    assert configs.examine_configs(second_is(lambda out: out.mul_(1.02)), spec).outcome is Outcome.FAIL
    monkeypatch.setattr(configs, "EQUAL_BITS", frozenset({"torch_vectorized"}))
    told = configs.examine_configs(second_is(nudge), spec)
    assert f"[{configs_of[1].label}]: other bits than [{configs_of[0].label}]" in told.faults


def test_configs_that_cut_sequences_elsewhere_may_have_other_bits(on_cpu, monkeypatch):
    spec = CaseSpec("small", (3, 0, 2, 1), k=16, v=8, io_dtype="float32")
    monkeypatch.setattr(configs, "EQUAL_BITS", frozenset({"torch_vectorized"}))

    def nudged_where(other, cuts):
        def around(run, config, call):
            out = run(call)
            if config["cut"] == other:
                out.view(torch.int32)[0, 0, 0, 0] += 1
            return out

        wrapped = Wrapped(backend("torch_vectorized"), around)
        blocks = [config["block_kib"] for config in wrapped.configs(calls.call_of(spec, device="cpu").problem())]
        offered = [Config.of(block_kib=block, cut=cut) for block, cut in zip(blocks, cuts, strict=False)]
        monkeypatch.setattr(wrapped, "configs", lambda problem: offered)
        return wrapped

    assert configs.examine_configs(nudged_where(128, (64, 128)), spec).outcome is Outcome.PASS
    assert configs.examine_configs(nudged_where(64, (64, 64)), spec).outcome is Outcome.PASS, "both are nudged"


# --- cells ------------------------------------------------------------------------------------------------------------

SMALL = Cell(3, 4, 4, 8, "float32", "vk")


def test_cells_are_called_as_in_every_other_table():
    names = {cell.case for cell in cells.CELLS}
    assert len(names) == len(cells.CELLS)
    assert {
        "decode N=64 H=16 HV=32 float32",
        "decode N=1 H=4 HV=8 bfloat16",
        "mixed 16x4 H=16 HV=32",
        "mixed 16x4 H=16 HV=32 bfloat16 kv",
        "mixed 1x64 H=4 HV=8",
    } <= names


def test_a_cells_floor_counts_states_twice_and_tokens_once():
    states = 2 * 64 * 32 * 128 * 128 * 4
    tokens = 64 * 2 * (2 * 16 * 128 + 2 * 32 * 128 + 2 * 32)
    assert Cell(64, 1, 16, 32, "float32", "vk").least_bytes == states + tokens


@pytest.mark.parametrize("cell", [SMALL, Cell(5, 1, 4, 8, "bfloat16", "kv")], ids=lambda c: c.case)
def test_a_cell_is_planned_as_the_problem_that_its_calls_pose(cell):
    (call,) = make_calls(cell, sets=1, device="cpu")
    on_gpu = replace(call.problem("graph"), device="cuda", arch=90, lengths_on_host=False)
    assert cell.problem(90) == on_gpu
    assert call.max_seqlen == cell.length, "on a GPU the host knows no more than this"


def test_quick_and_a_pattern_choose_cells():
    assert {(c.hv, c.state, c.layout) for c in select(None, quick=True)} == {(32, "float32", "vk")}
    assert [c.case for c in select("16x4 H=4", quick=False) if c.layout == "vk" and c.state == "float32"] == [
        "mixed 16x4 H=4 HV=8"
    ]


def test_graphs_turn_whole_rounds_and_last_long_enough():
    assert launches_for(1.4, 8) == 120
    assert launches_for(360.0, 8) == 16
    assert all(launches_for(us, 8) % 8 == 0 for us in (0.3, 5.6, 22.5, 90.0))


@pytest.mark.parametrize("cell", [SMALL, Cell(20, 1, 4, 8, "bfloat16", "kv")], ids=lambda c: c.case)
def test_a_launch_on_a_cell_is_judged_on_a_sample_and_compared_everywhere(cell):
    made = make_calls(cell, sets=2, device="cpu")
    one = backend("torch_vectorized")
    run = one.bind(made[0].problem("graph"), one.configs(made[0].problem("graph"))[0])
    truth = Truth(made[0], cell.length)
    judgement, new = truth.judge(run(truth.prepare()))
    assert judgement.ok
    assert judgement.rel_o > 0
    assert not new
    _, again = truth.judge(run(truth.prepare()))
    assert not again, "states are put back, so the same launch leaves the same bits"
    out = run(truth.prepare())
    out[0, 1, 1, 3] += 1.0  # a head and a row outside the sample
    assert truth.judge(out)[1]
    out = run(truth.prepare())
    made[0].pool[1, 2] += 1.0
    assert truth.judge(out)[1]
    out = run(truth.prepare())
    made[0].pool[0, 0] *= 1.05
    assert not truth.judge(out)[0].ok
    out = run(truth.prepare())
    out[0, -1, -1] *= 1.05
    assert not truth.judge(out)[0].ok
    assert bool(torch.isnan(truth.prepare().out).all()), "what a launch does not write must show"


# --- speeds -----------------------------------------------------------------------------------------------------------


def line(case: str, floor: float, **us: float) -> list[dict]:
    return [
        timing_row(case, name, backend=name, config="c", graph_us=t, floor_us=floor, stage="bench", status="pass")
        for name, t in us.items()
    ]


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        (
            line("decode N=1 H=16 HV=32 float32", 1.4, cupy=4.0, triton=4.9, sgl_triton=4.8),
            ["triton us against SGLang"],
        ),
        (line("decode N=256 H=16 HV=32 float32", 360.0, cupy=392.0, triton=391.0), ["cupy us against 92% of copy"]),
        (line("mixed 16x4 H=4 HV=8", 5.7, cupy=10.0, numba_cuda=13.1), ["numba_cuda us against 1.3"]),
        (line("mixed 1x64 H=16 HV=32", 1.9, cupy=33.0), ["cupy us per token"]),
        (line("mixed 1x64 H=4 HV=8", 0.5, cupy=33.0), []),
        (line("decode N=64 H=16 HV=32 float32", 90.0, cupy=94.0, triton=95.0, numba_cuda=96.0, sgl_triton=102.0), []),
    ],
)
def test_goals_that_are_missed_are_listed(rows, missed):
    listed = [goal.what for goal in limits.goals(rows) if not goal.met]
    assert len(listed) == len(missed)
    assert all(what.startswith(start) for what, start in zip(listed, missed, strict=True))


def test_the_summary_has_a_line_per_cell():
    made = report()
    for row in line("decode N=1 H=16 HV=32 float32", 1.4, cupy=4.0, triton=3.5, sgl_triton=4.8):
        made.rows["bench", row["implementation"], row["case"]] = row
    (table,) = cli.summary(made)
    assert table.row_count == 1
    assert [c.header for c in table.columns][1:5] == ["floor", "cupy", "triton", "sgl_triton"]


def test_the_documents_table_shows_times_and_checks(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_tables", ROOT / "tools" / "gpu_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    rows = line("decode N=1 H=16 HV=32 float32", 1.4, triton=3.5, cupy=4.0, sgl_triton=4.8)
    for row in rows:
        row["eager_us"] = 10.0
    rows.append(timing_row("suite N1", "cupy", stage="suite", status="pass"))
    meta = {"date": "2026-01-01", "gpu": "G", "versions": {"torch": "2"}, "command": "c", "copy_TB_s": 2.97}
    (tmp_path / "2026-01-01_g_gpu_suite.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    text = tables.recurrent(tmp_path)
    assert "| decode N=1 H=16 HV=32 float32 | 1.4 | 4.0 / 10 | 3.5 / 10 | 4.8 / 10 | 2.50 |" in text
    assert "| suite | pass 1 |" in text
    assert "copy 2.97 TB/s" in text
