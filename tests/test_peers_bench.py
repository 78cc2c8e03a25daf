"""The comparison with other libraries: its cells, its processes, its judge and its table; one whole run on the CPU."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import isokern
from isokern import registry
from isokern.tools.gpu_test.report import timing_row
from isokern.tools.peers_table import lines_of, peers, peers_summary, render

ROOT = Path(isokern.__file__).parent
BENCHMARKS = ROOT / "benchmarks"


def load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


load("record")
cells = load("peers_cells")
load("peers_judge")
child = load("peers_child")
bench = load("peers")


def row(case, who, graph=None, eager=None, group="decode", **extra):
    return timing_row(case, who, graph_us=graph, eager_us=eager, floor_us=1.4, error=0.002, group=group, **extra)


# ---- cells


def test_the_groups_are_those_of_the_goals():
    sizes = {group: sum(cell.group == group for cell in cells.CELLS) for group in cells.GROUPS}
    assert sizes == {"decode": 14, "short": 26, "mixed": 4, "prefill": 12, "report": 15, "prompts": 8, "gate": 0}
    names = [cell.case for cell in cells.CELLS]
    assert len(set(names)) == 79
    for name in (
        "decode N=1 H=16 HV=32 float32",
        "decode N=256 H=16 HV=32 bfloat16",
        "mixed 63x1+1x2048 H=4 HV=8",
        "prefill short 4x64 H=16 HV=32",
        "prefill skew 8192 H=4 HV=8",
        "prefill 1x32768 H=16 HV=32",
        "verify 64x4 H=4 HV=8",
        "decode N=64 H=16 HV=32 bfloat16 kv",
        "mixed 16x4 H=16 HV=32 kv",
    ):
        assert name in names
    skew = next(cell for cell in cells.CELLS if cell.case == "prefill skew 8192 H=16 HV=32")
    assert (skew.spec.n, skew.spec.tokens, max(skew.spec.lengths)) == (32, 8192, 6208)


def test_verification_keeps_the_state_after_each_token_and_kv_twins_differ_in_nothing_else():
    named = {cell.case: cell.spec for cell in cells.CELLS}
    verify = named["verify 16x4 H=16 HV=32"]
    assert (verify.verify, verify.update, verify.state_layout) == ("chain", "disabled", "vk")
    for name, spec in named.items():
        if name.endswith(" kv"):
            assert spec == named[name.removesuffix(" kv")].but(name=name, state_layout="kv")


def test_eager_times_count_where_the_host_matters():
    counting = [cell for cell in cells.CELLS if cell.eager_counts]
    assert {cell.group for cell in counting} == {"decode", "short", "mixed"}
    assert max(cell.spec.n for cell in counting if cell.group == "decode") == 16
    assert len(counting) == 8 + 26 + 4


def test_groups_and_implementations_are_chosen_by_name():
    assert {cell.group for cell in bench.chosen_cells("mixed,short", False)} == {"mixed", "short"}
    with pytest.raises(bench.typer.BadParameter, match="warm"):
        bench.chosen_cells("warm", False)
    some = [cell.case for cell in bench.chosen_cells("gate,short", False, "64x128|256x4")]
    assert len(some) == len(cells.GATES) + 4
    with pytest.raises(bench.typer.BadParameter, match="nowhere"):
        bench.chosen_cells(None, False, "nowhere")
    with pytest.raises(bench.typer.BadParameter, match="fla_recurrent"):
        bench.chosen_implementations("fla", cells.SMOKE, "cpu", 0)
    chosen = bench.chosen_implementations(None, cells.SMOKE, "cpu", 0)
    assert chosen[0] == "isokern"
    assert "torch_vectorized" in chosen
    assert not set(chosen) & set(bench.information("cpu")["peers"])  # none runs on a CPU


# ---- judging


def test_a_run_is_judged_on_its_first_tokens_and_whole_states():
    made = child.Bench(cells.Cell("mixed", cells.SMOKE[2].spec.but(lengths=(1, 1, 400))), "cpu")
    right = registry.backends("fused_sigmoid_gating")["torch_vectorized"]
    problem = made.calls[0].problem("eager")
    run = right.bind(problem, right.configs(problem)[0])
    (call, *_) = made.with_out()
    good = made.truth.judge(run(call))
    assert good.ok
    made.truth.restore()
    out = run(call)
    out[0, 2, 0, 3] += 1.0
    assert not made.truth.judge(out).ok
    made.truth.restore()
    out = run(call)
    call.pool[call.read_slots[1].long()] += 1.0  # a state that is wrong
    assert not made.truth.judge(out).ok
    made.truth.restore()
    assert torch.equal(call.pool[call.read_slots.long()], made.truth._start)


VERIFY = cells.Cell("report", cells.SMOKE[1].spec.but(name="verify 2x4 smoke", verify="chain", update="disabled"))


def test_intermediate_states_are_judged_and_counted():
    made = child.Bench(VERIFY, "cpu", 3)
    first, second, _ = made.calls
    assert first.intermediates.data_ptr() != second.intermediates.data_ptr()  # as cold as the states
    assert made.as_arguments()[1]["intermediate_states_buffer"] is second.intermediates
    h, hv, k, v = 1, 2, 16, 8
    tokens = 8 * 2 * (2 * h * k + 2 * hv * v + 2 * hv)
    assert made.bytes == tokens + 2 * hv * k * v * 4 * (1 + 4)  # each state is read once, and written after each token
    right = registry.backends("fused_sigmoid_gating")["torch_vectorized"]
    problem = first.problem("eager")
    run = right.bind(problem, right.configs(problem)[0])
    call = made.with_out()[0]
    out = run(call)
    assert made.truth.judge(out).ok
    call.intermediates[call.intermediate_rows[1].long(), 2] += 1.0
    assert "intermediate state" in made.truth.judge(out).faults[0]
    made.truth.restore()
    assert not made.truth.judge(out).ok  # what an earlier run wrote is no later one's
    out = run(call)
    call.pool[call.read_slots[0].long()] += 1.0
    assert made.truth.judge(out).faults == ("a state that was not to be updated has changed",)
    assert child._own_choice(made)["extra"]["status"] == "timed"


def test_what_is_wrong_is_not_timed():
    made = child.Bench(cells.SMOKE[1], "cpu")

    def wrong(call):
        return call.out.fill_(1.0)

    timed, judged = child._timed(made, "mine", {"only": child.Candidate("only", wrong, made.with_out())})
    assert timed["extra"]["status"] == "wrong"
    assert timed["eager_us"] is None
    assert "not the same job" in timed["extra"]["faults"][0]
    assert not judged["only"]["conforms"]


@pytest.mark.parametrize("fault", [None, "by host", "replayed"])
def test_what_runs_from_the_host_and_what_a_graph_replays_are_both_judged(monkeypatch, fault):
    """The registry may choose otherwise in a graph: neither verdict stands for the other."""
    made = child.Bench(cells.SMOKE[1], "cpu")
    right = registry.backends("fused_sigmoid_gating")["torch_vectorized"]
    problem = made.calls[0].problem("eager")
    run = right.bind(problem, right.configs(problem)[0])
    errors, judge = [], made.truth.judge

    def launch(call):
        return call.out.fill_(1.0) if fault == "by host" else run(call)

    def replayed(bench, candidate):
        bench.truth.restore()
        out = run(candidate.calls[0])
        return out + 1.0 if fault == "replayed" else out

    def judged_apart(out, chunk):
        errors.append(
            replace(judge(out, chunk), rel_o=0.001 * (1 + len(errors))) if fault is None else judge(out, chunk)
        )
        return errors[-1]

    monkeypatch.setattr(child.Bench, "replayed", replayed)
    monkeypatch.setattr(made.truth, "judge", judged_apart)
    candidate = child.Candidate("", launch, made.with_out(), None, child.Bound(None))
    timed, judged = child._timed(made, child.OWN, {"": candidate})
    assert timed["extra"]["status"] == ("timed" if fault is None else "wrong")
    if fault is None:
        assert (judged[""]["by_host"]["error"], timed["error"]) == (0.001, 0.002), "of what is timed by graph"


def test_the_registry_s_choice_and_its_warm_up_are_under_the_policy_in_force(tmp_path):
    environment, store = registry.default.environment("cpu"), registry.default.store
    for policy in ("float32", "rounded"):
        with registry.use("fused_sigmoid_gating", accuracy=policy):
            [planned] = child._planned(cells.SMOKE[:1], "cpu", environment, store)
            found = child._own_choice(child.Bench(cells.SMOKE[0], "cpu"))
        assert planned.task.problem.accuracy == planned.task.recipe.accuracy == policy
        assert (found["extra"]["status"], found["extra"]["accuracy"]) == ("timed", policy)
    with pytest.raises(bench.typer.BadParameter, match="half"):
        bench.run(tmp_path / "x.json", accuracy="half")
    with pytest.raises(bench.typer.BadParameter, match="cold"):
        bench.run(tmp_path / "x.json", modes="cold")


@pytest.mark.parametrize(("modes", "expected"), [(("graph", "eager"), "gge"), (("graph",), "gg"), (("eager",), "e")])
def test_problems_are_planned_by_graph_first_and_eagerly_where_that_counts(monkeypatch, modes, expected):
    monkeypatch.setattr(child, "admit", lambda *_: SimpleNamespace(candidates=(), declined=()))  # there is no GPU
    monkeypatch.setattr(child, "known", lambda *_: None)
    environment, store = registry.default.environment("cpu"), registry.default.store
    few = [cell for cell in cells.CELLS if cell.case in ("decode N=256 H=4 HV=8 float32", "mixed 1x16 H=4 HV=8")]
    planned = list(child._planned(few, "cuda", environment, store, modes))
    assert "".join(problem.task.recipe.mode[0] for problem in planned) == expected
    assert planned[-1].cases == ("mixed 1x16 H=4 HV=8",)
    assert [p.task.recipe.mode for p in child._planned(few, "cpu", environment, store)] == ["eager"] * 2


def test_the_registry_s_choice_is_held_to_the_bound_of_who_runs(monkeypatch):
    monkeypatch.setenv("ISOKERN_BACKEND_FUSED_SIGMOID_GATING", "torch_chunked")
    registry.refresh()
    try:
        made = child.Bench(cells.SMOKE[0], "cpu")
        found = child._own_choice(made)
    finally:
        monkeypatch.undo()
        registry.refresh()
    assert found["backend"] == "torch_chunked"
    assert list(made.truth._references) == [int(found["config"].partition("chunk=")[2].partition(",")[0])]


# ---- processes


class Scripted:
    """A child whose words are known: each process says its lines, then ends (``None``) or falls silent."""

    scripts: list
    started: list

    def __init__(self, words):
        self.started.append(json.loads(words[words.index("--cells") + 1]))
        self.lines = iter(self.scripts.pop(0))

    def say(self, limit):
        line = next(self.lines)
        if line == "silence":
            raise TimeoutError
        return line

    def kill(self):
        pass

    def end(self):
        return "exit status -11: illegal memory access"


@pytest.fixture
def scripted(monkeypatch):
    Scripted.scripts, Scripted.started = [], []
    monkeypatch.setattr(bench, "Child", Scripted)
    return Scripted


def done(cell):
    return {"begin": cell.case}, {"row": row(cell.case, "lib", 1.0, 2.0)}


def test_a_crash_costs_one_cell_and_the_next_process_goes_on(scripted):
    one, two, three = cells.SMOKE
    scripted.scripts = [[*done(one), {"begin": two.case}, None], [*done(three), None]]
    rows = list(bench.run_implementation("lib", cells.SMOKE, [], 1.0))
    assert [(r["case"], r["extra"].get("status")) for r in rows] == [
        (one.case, None),
        (two.case, "crashed"),
        (three.case, None),
    ]
    assert "illegal memory access" in rows[1]["extra"]["faults"][0]
    assert scripted.started == [[c.case for c in cells.SMOKE], [three.case]]


def test_silence_ends_a_cell_too(scripted):
    one, *rest = cells.SMOKE
    scripted.scripts = [[{"begin": one.case}, "silence"], [*done(rest[0]), *done(rest[1]), None]]
    rows = list(bench.run_implementation("lib", cells.SMOKE, [], 1.0))
    assert [r["extra"].get("status") for r in rows] == ["timeout", None, None]


def test_one_that_cannot_even_start_is_not_started_again(scripted):
    scripted.scripts = [[None]]
    rows = list(bench.run_implementation("lib", cells.SMOKE, [], 1.0))
    assert [r["extra"]["status"] for r in rows] == ["crashed"] * 3
    assert len(scripted.started) == 1


def test_a_child_that_gives_its_device_up_is_followed_by_another(scripted):
    one, two, three = cells.SMOKE
    scripted.scripts = [[*done(one), None], [*done(two), *done(three), None]]
    assert len(list(bench.run_implementation("lib", cells.SMOKE, [], 1.0))) == 3
    assert scripted.started[1] == [two.case, three.case]


# ---- the file and the table

RESULT = {
    "meta": {"peers": ["lib_a", "lib_b"], "date": "2026-01-02", "gpu": "H100", "versions": {"a": "1"}, "command": "c"},
    "rows": [
        row("decode N=1 x", "isokern", 2.0, 10.0),
        row("decode N=1 x", "lib_a", 4.0, 80.0),
        row("decode N=1 x", "lib_b", 3.0, 90.0),
        row("decode N=1 x", "cupy", 2.0, 9.0),
        row("decode N=64 x", "isokern", 10.0, 20.0),
        row("decode N=64 x", "lib_a", 9.0, 80.0),
        row("decode N=64 x", "lib_b", status="crashed"),
        row("mixed 1x4 x", "lib_b", 8.0, 90.0, group="short"),
    ],
}


def test_the_table_sets_the_best_peer_beside_isokern():
    one, many, short = lines_of(RESULT)
    assert (one.best_peer(), one.ratio(), one.ratio("eager_us")) == ("lib_b", 1.5, 8.0)
    assert (many.best_peer(), many.ratio()) == ("lib_a", 0.9)
    assert (short.best_peer(), short.ratio()) == ("lib_b", None)
    text = render(RESULT)
    assert "| decode N=1 x | 1.4 | 2.0 / 10 | 2.0 / 9 | 4.0 / 80 | 3.0 / 90 | lib_b | 1.50 |" in text
    assert "| crashed |" in text
    assert "| decode, CUDA graph | 2 | 1.16 | 0.90 | decode N=64 x |" in text
    assert "| decode N <= 16 and short, eager | 1 | 8.00 | 8.00 | decode N=1 x |" in text
    assert list(bench.short_of(RESULT)) == ["SHORT decode N=64 x: 0.90 of 1.0"]


def test_a_page_may_have_the_table_of_some_groups(tmp_path):
    (tmp_path / "2026-01-02_h100_peers.json").write_text(json.dumps(RESULT))
    text = peers(tmp_path, ("short",))
    assert "| mixed 1x4 x |" in text
    assert "decode N=1 x" not in text
    assert peers_summary(tmp_path).startswith("| best peer / isokern | cells |")
    assert "Measured 2026-01-02 on H100; a 1." in peers_summary(tmp_path)


def test_documents_show_the_newest_comparison(tmp_path):
    assert peers(tmp_path) == peers_summary(tmp_path) == "Not measured yet.\n"
    (tmp_path / "2026-01-02_h100_peers.json").write_text(json.dumps(RESULT))
    (tmp_path / "2026-01-03_h100_peers.json").write_text(json.dumps({"meta": {}, "rows": []}))  # of another kind
    assert "Measured 2026-01-02 on H100; a 1; `c`." in peers(tmp_path)


def test_a_file_of_another_kind_is_not_resumed(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"meta": {}, "rows": []}))
    with pytest.raises(ValueError, match="no result of this comparison"):
        bench.Results(file, {}).resume()


def test_resuming_keeps_the_counters_of_a_file(tmp_path):
    file = tmp_path / "x.json"
    counted = {"counters": [{"case": "x"}], "counters_made": [{"gpu": "H100"}]}
    file.write_text(json.dumps(RESULT | {"meta": RESULT["meta"] | counted}))
    results = bench.Results(file, {"peers": []})
    results.resume()
    assert results.meta == {"peers": [], **counted}


def test_a_whole_run_and_its_resumption(tmp_path):
    out = tmp_path / "peers.json"
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "run", "--smoke", "--out", str(out), "--warmup", "0"]
    command += ["--store", str(tmp_path / "store")]
    command += ["--libraries", "isokern,torch_vectorized,fla_recurrent"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 11  # three cells each, and a gate for all but the registry's choice
    for found in (SimpleNamespace(**r) for r in result["rows"]):
        if found.implementation == "fla_recurrent":
            assert found.extra["status"] == "declined"
            assert "not installed" in found.extra["faults"][0]
        elif found.case.startswith("gate"):
            assert found.extra["status"] == "conforms"
            assert found.eager_us is None
        else:
            assert found.extra["status"] == "timed"
            assert found.extra["conforms"]
            assert found.eager_us > 0
    assert "| decode N=3 smoke |" in run.stdout
    assert "| `torch_vectorized` | conforms |" in run.stdout
    # What is there is not run again; what ended badly is.
    result["rows"][0]["extra"]["status"] = "crashed"
    out.write_text(json.dumps(result))
    left = {case: row for case, row in ((r["case"], r) for r in result["rows"]) if not bench._final(row)}
    assert len(left) == 1
    results = bench.Results(out, {})
    assert results.resume() == 11
