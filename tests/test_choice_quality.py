"""The harness that judges choices: its arithmetic on made-up numbers, and one problem for real on planted backends."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import isokern
from isokern.autotune.policy import MeasurePolicy
from isokern.autotune.regret import NothingToCompareError, lengths_in_bucket, measure_regret, split_regret
from isokern.autotune.worker import Limits, Worker
from isokern.cache import CandidateRecord, Entry, Layer, Store
from isokern.cache.environment import current_environment
from isokern.cache.found import Located
from isokern.registry.varlen.profile import VarlenProfile

TESTS = Path(__file__).parent
BENCHMARKS = Path(isokern.__file__).parent / "benchmarks"


def load(name: str, folder: Path):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


load("record", BENCHMARKS)
shapes = load("choice_shapes", BENCHMARKS)
processes = load("choice_processes", BENCHMARKS)
traps = load("choice_planted", BENCHMARKS)
leaving = load("choice_left_out", BENCHMARKS)
harness = load("choice_quality", BENCHMARKS)
warmup_tests = load("test_warmup", TESTS)
planted = warmup_tests.planted


# ---- regret


def noisy(seconds: dict[str, float], blocks: int, sigma: float, seed=0):
    draw = random.Random(seed)
    found = []
    for _ in range(blocks):
        drift = math.exp(draw.gauss(0, 0.3))  # the machine's, shared by a block
        found.append({name: s * drift * math.exp(draw.gauss(0, sigma)) for name, s in seconds.items()})
    return found


def test_the_best_candidate_has_no_regret():
    assert split_regret(noisy({"a": 1.0, "b": 1.2}, 10, 0.0), "a") == ("a", 0.0)


def test_regret_is_by_how_much_the_choice_is_slower_whatever_the_machine_does_meanwhile():
    best, regret = split_regret(noisy({"a": 1.0, "b": 1.2, "c": 3.0}, 40, 0.01), "b")
    assert best == "a"
    assert regret == pytest.approx(0.2, abs=0.01)


def test_many_equals_do_not_make_a_regret():
    """Picked and judged on the same samples, the luckiest of ten equals would seem to be several percent faster."""
    equals = {f"c{i}": 1.0 for i in range(10)}
    found = [split_regret(noisy(equals, 10, 0.05, seed), "c0")[1] for seed in range(60)]
    assert abs(sum(found) / len(found)) < 0.012


def test_one_block_is_too_few():
    with pytest.raises(ValueError, match="two blocks"):
        split_regret(noisy({"a": 1.0}, 1, 0.0), "a")


def test_lengths_of_a_bucket_are_others_of_the_same_profile():
    draw = random.Random(3)
    found = Counter()
    for _ in range(120):
        lengths = [draw.choice([1, draw.randint(1, 60), draw.randint(1, 900)]) for _ in range(draw.randint(1, 40))]
        profile = VarlenProfile.of(len(lengths), sum(lengths), max(lengths))
        layouts = {lengths_in_bucket(profile, seed) for seed in range(3)} - {None}
        found["none" if not layouts else "some"] += 1
        for layout in layouts:
            drawn = layout.lengths()
            assert VarlenProfile.of(len(drawn), sum(drawn), max(drawn)) == profile
    assert found["some"] > 10 * found["none"]


class Choice(SimpleNamespace):
    """A decision, as far as the harness looks at it."""


def decision(backend: str) -> Choice:
    return Choice(backend=backend, config={}, rule=SimpleNamespace(value="heuristic"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    kinds = (planted.Sluggish, planted.Swift, planted.PrintsAndExits, planted.FailsToBind)
    return warmup_tests.plan_at(tmp_path_factory.mktemp("quality"), ("decode N=1",), kinds)


@pytest.fixture(scope="module")
def worker():
    with Worker("cpu", 1, Limits(call=20.0)) as found:
        yield found


POLICY = MeasurePolicy(min_sample_us=50.0, rotate_l2=1.0)


def test_a_slow_choice_is_found_out_and_broken_candidates_do_not_matter(plan, worker):
    task = plan.problems[0].task
    found = measure_regret(worker, task, decision("sluggish"), plan.registry, POLICY, blocks=4)
    assert (found.choice, found.best, found.rule) == ("sluggish[default]", "swift[default]", "heuristic")
    assert found.regret > 1.0, "it sleeps for 30 ms"
    assert found.choice_us > 30_000
    assert found.candidates == 2


def test_short_calls_are_timed_more_often_while_there_is_time(plan, worker):
    task = plan.problems[0].task
    refused = {"sluggish[default]"}
    found = measure_regret(
        worker, task, decision("swift"), plan.registry, POLICY, refused=refused, blocks=2, spare_s=60
    )
    assert found.blocks >= 5, "half of five times two; twice that where the machine was disturbed"


def test_what_is_known_to_be_wrong_is_no_standard(plan, worker):
    task = plan.problems[0].task
    refused = {"swift[default]"}
    found = measure_regret(worker, task, decision("sluggish"), plan.registry, POLICY, refused=refused, blocks=2)
    assert found.best == "sluggish[default]"
    assert found.regret == 0.0


def test_a_choice_that_cannot_run_is_reported(plan, worker):
    task = plan.problems[0].task
    with pytest.raises(NothingToCompareError, match="ptxas"):
        measure_regret(worker, task, decision("fails_to_bind"), plan.registry, POLICY, blocks=2)
    with pytest.raises(NothingToCompareError, match="is no candidate"):
        measure_regret(worker, task, decision("gone"), plan.registry, POLICY, blocks=2)


# ---- shapes


def test_held_out_shapes_are_many_different_and_repeatable():
    cases = shapes.held_out_cases(40, 4096)
    assert len({c.name for c in cases}) == 40
    assert {c.phase.value for c in cases} == {"decode", "mixed", "prefill"}
    assert cases == shapes.held_out_cases(40, 4096)
    assert max(c.lengths.longest for c in cases) <= 4096


def test_transfer_shapes_have_the_problem_they_are_for(tmp_path):
    plan = warmup_tests.plan_at(tmp_path, ("decode N=1", "mixed 3x1+1x16", "verify 4x4"))
    tasks = shapes.transfer_tasks(plan, 2)
    keys = {p.cases[0]: p.task.key for p in plan.problems}
    assert {t.recipe.case.name.partition(" as ")[0] for t in tasks} == {"mixed 3x1+1x16", "verify 4x4"}, "N=1 has one"
    for task in tasks:
        assert task.key == keys[task.recipe.case.name.partition(" as ")[0]]
        made = shapes.describe(task.recipe.case, "cpu", 0, task.recipe.mode)
        assert made.tuning_key() == task.key, "what a worker will make of it"


# ---- sums


def entry(mode, winner, medians, n=1):
    candidates = tuple(CandidateRecord(name, {}, "ok", median_us=us) for name, us in medians.items())
    chosen = next(c for c in candidates if c.backend == winner)
    return SimpleNamespace(
        key={"mode": mode, "n": n}, label=chosen.label, chosen=chosen, candidates=candidates, measured={"policy": mode}
    )


def test_launch_modes_are_compared_problem_by_problem():
    entries = [
        entry("eager", "numba", {"numba": 10.0, "cupy": 12.0}),
        entry("graph", "cupy", {"numba": 8.0, "cupy": 2.0}),
        entry("eager", "cupy", {"cupy": 3.0}, n=2),
        entry("graph", "cupy", {"cupy": 1.0}, n=2),
        entry("eager", "cupy", {"cupy": 3.0}, n=4),
    ]
    assert harness.mode_summary(entries) == {"pairs": 2, "differ": 1, "worst": 4.0}
    assert harness.mode_summary([]) == {"pairs": 0, "differ": 0, "worst": 1.0}


def test_agreement_counts_the_largest_group_of_runs():
    a, b = (("x", "cupy"), ("y", "triton")), (("x", "cupy"), ("y", "cupy"))
    assert processes.agreement_summary([a, b, a, a]) == {"runs": 4, "agreeing": 3, "problems": 2}


def test_regrets_below_zero_count_as_none():
    rows = [
        SimpleNamespace(extra={"what": "held_out", "regret": r, "rule": rule})
        for r, rule in ((-0.02, "tuned-user"), (0.04, "heuristic"))
    ]
    summary = harness.regret_summary(rows, "held_out")
    assert summary == {
        "count": 2, "mean": pytest.approx(0.02), "signed_mean": pytest.approx(0.01), "worst": 0.04,
        "by_tuned_choice": 1, "by_neighbour": 0,
    }  # fmt: skip
    assert harness.regret_summary(rows, "transfer") is None


def test_refused_candidates_are_those_that_broke_somewhere():
    records = (
        CandidateRecord("a", {}, "rejected", "slow", "x"),
        CandidateRecord("b", {}, "rejected", "wrong", "x"),
        CandidateRecord("c", {}, "rejected", "device", "x"),
        CandidateRecord("d", {"t": 1}, "rejected", "timeout", "x"),
    )
    assert harness.refused_labels([SimpleNamespace(candidates=records)]) == {"b[default]", "d[t=1]"}


def test_the_estimate_is_held_against_what_it_took():
    report = SimpleNamespace(plan=SimpleNamespace(estimate_s=80.0, shards=(("a model", 4),)), skipped=(), seconds=120.0)
    summary = harness.estimate_summary([report])
    assert summary["ratio"] == 1.5
    assert summary["by_tp"] == {"4": {"estimated_s": 80.0, "took_s": 120.0}}
    assert summary["text"] == "2 min 00 s of tuning, 1 min 20 s estimated"
    report.plan.estimate_s = 0.0
    assert harness.estimate_summary([report]) is None


# ---- leaving out


def stored(n, winner, medians, **key):
    """An entry for decode of ``n`` rows; None in ``medians``: not called."""
    records = [
        CandidateRecord(name, {}, "ok", median_us=us, samples_us=(us,), fingerprint="f")
        if us
        else CandidateRecord(name, {}, "rejected", "slow", "?", fingerprint="f")
        for name, us in medians.items()
    ]
    measured = {"policy": "graph", "created": "2026-01-01", "seconds": 1.0, "isokern": "0", "launches": 1, "method": ""}
    entry = Entry(
        op="x", contract_version=1, key={"n": n, "tokens": n, "longest": 1, "length_class": "decode", **key},
        backend=winner, config={}, margin_over_runner_up=None, margin_over_default=None, rule="?",
        candidates=(CandidateRecord("gone", {}, "rejected", "device", "?"), *records), measured=measured,
        environment="e" * 16,
    )  # fmt: skip
    return Located(entry, None, None, None)


def test_each_entry_is_chosen_for_by_the_others():
    located = [
        stored(4, "a", {"b": 2.0, "a": 1.0}),
        stored(8, "a", {"b": 1.5, "a": 1.0}),
        stored(16, "b", {"b": 1.0, "a": 1.2}),
    ]
    rows = leaving.left_out(located)
    assert [row.backend for row in rows] == ["a", "a", "a"]
    assert [row.extra["regret"] for row in rows] == [0.0, 0.0, pytest.approx(0.2)]
    assert [row.extra["default_regret"] for row in rows] == [1.0, 0.5, 0.0], "the first that could run"
    assert [(row.extra["rule"], row.extra["by"]) for row in rows] == [("neighbour", 2)] * 3
    summary = harness.left_out_summary(rows)
    assert (summary["count"], summary["by_neighbour"], summary["worst"]) == (3, 3, pytest.approx(0.2))
    assert (summary["heuristic_mean"], summary["heuristic_worst"]) == (0.5, 1.0)


def test_an_entry_that_none_is_near_is_left_to_the_heuristic_order():
    located = [stored(4, "a", {"b": 1.1, "a": 1.0}), stored(4, "a", {"b": 1.1, "a": 1.0}, h=16)]
    for row in leaving.left_out(located):
        assert (row.extra["rule"], row.backend, row.extra["by"]) == ("heuristic", "b", 0)
    assert harness.left_out_summary([]) is None


def test_the_same_entry_in_another_layer_does_not_foretell_it():
    same = {"b": 1.1, "a": 1.0}
    assert [row.extra["rule"] for row in leaving.left_out([stored(4, "a", same), stored(4, "a", same)])] == [
        "heuristic",
        "heuristic",
    ]


def test_a_choice_that_was_too_slow_to_be_called_is_charged_a_factor_of_two():
    located = [stored(4, "a", {"a": 1.0, "b": 1.5}), stored(8, "b", {"a": None, "b": 1.0})]
    regrets = [row.extra["regret"] for row in leaving.left_out(located)]
    assert regrets == [0.0, 1.0], "the other batch says nothing of a default that was too slow there"


def test_a_store_can_be_judged_without_a_device(tmp_path):
    store = Store([Layer("explicit", tmp_path, writable=True)])
    environment = current_environment("cpu")
    for located in (stored(4, "a", {"b": 2.0, "a": 1.0}), stored(8, "a", {"b": 1.5, "a": 1.0})):
        store.put(replace(located.entry, environment=environment.hash), environment)
    found = CliRunner().invoke(harness.app, ["left-out", str(tmp_path), "--out", str(tmp_path / "rows.json")])
    assert found.exit_code == 0, found.output
    assert "mean regret 0.00 %, worst 0.00 %, 2 entries, 2 by near ones" in found.output
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2
    (tmp_path / "empty").mkdir()
    assert CliRunner().invoke(harness.app, ["left-out", str(tmp_path / "empty")]).exit_code == 1


@pytest.mark.parametrize(
    ("record", "expected", "fine"),
    [
        (CandidateRecord("a", {}, "rejected", "wrong", "off by 3"), "wrong", True),
        (CandidateRecord("a", {}, "rejected", "raised", "?"), "wrong", False),
        (CandidateRecord("a", {}, "ok", median_us=1.0, samples_us=(1.0,)), "wrong", False),
        (CandidateRecord("a", {}, "ok", median_us=1.0, samples_us=(1.0,)), None, True),
        (CandidateRecord("a", {}, "rejected", "slow", "1.1x", 1.1, (1.1,)), None, True),
        (CandidateRecord("a", {}, "rejected", "wrong", "off by 3"), None, False),
    ],
)
def test_a_planted_candidate_must_end_as_it_deserves(record, expected, fine):
    row = traps.judged(record, expected, "graph")
    assert row.extra["as_expected"] is fine
    assert traps.planted_summary([row])["as_expected"] == int(fine)


@pytest.mark.parametrize(
    ("gpu", "device", "name"),
    [("NVIDIA H100 80GB HBM3", "cuda", "h100"), ("NVIDIA H100", "cpu", "none"), (None, "cpu", "none")],
)
def test_results_are_named_after_the_device(gpu, device, name):
    assert harness.gpu_name({"gpu": gpu, "device": device}) == name
