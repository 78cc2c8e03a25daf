"""Ranks agree on their choices or do without: four gloo processes, and one alone. And pinning, which it rests on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from isokern.cache import Plan, Store
from isokern.cache.environment import Environment
from isokern.cache.silicon import CudaSilicon
from isokern.errors import PlanError
from isokern.registry import Rule
from isokern.registry.agreement import MESSAGE_BYTES, RankState, Standing, agree
from isokern.registry.explain import render

RANKS = 4
NOTHING_TUNED = ("nobody_has_any", "equal_tables_alone", "one_ships_others")
SCRIPT = Path(__file__).with_name("agreeing_rank.py")


def load_script():
    spec = importlib.util.spec_from_file_location("agreeing_rank", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["agreeing_rank"] = module
    spec.loader.exec_module(module)
    return module


rank_script = load_script()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What each of four ranks saw in each scenario."""
    folder = tmp_path_factory.mktemp("job")
    for scenario in rank_script.SCENARIOS:
        for rank in range(RANKS):
            root = folder / scenario / str(rank)
            if "tables" in scenario or "ships" in scenario:
                rank_script.ship(root, tile=4 if (scenario, rank) == ("one_ships_others", 1) else 8)
            if scenario in NOTHING_TUNED or (scenario, rank) == ("one_has_none", 3):
                continue
            if (scenario, rank) == ("one_pins_what_others_stored", 2):
                continue
            rank_script.choose(root, tile=4 if scenario.endswith("one_chose_otherwise") and rank == 2 else 8)
            if scenario == "all_share_a_damaged_store" or (scenario, rank) == ("one_is_corrupt", 1):
                victim = sorted(root.rglob("entries/toy/*.json"))[0]
                victim.write_bytes(victim.read_bytes()[:100])
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, folder, str(rank), str(RANKS)], stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def seen(job, scenario):
    return [rank[scenario] for rank in job]


def test_ranks_with_equal_stores_follow_one_plan(job):
    for rank in seen(job, "equal"):
        assert rank["ok"]
        assert rank["chose"][:3] == ["quick", {"tile": 8}, "plan"]
        assert rank["chose"][3] == f"plan {rank['hash']}"
        assert "4 ranks have agreed on" in rank["missed"][2][0], "a miss says whose plan it is not in"
    assert len({rank["hash"] for rank in seen(job, "equal")}) == 1


def test_what_is_tuned_later_changes_nothing_until_they_agree_again(job):
    for rank in seen(job, "equal"):
        assert rank["later"] == ["quick", {"tile": 8}]
        assert rank["again"], "the stores then hold the same again"


@pytest.mark.parametrize(
    ("scenario", "who", "standing", "why"),
    [
        ("one_chose_otherwise", 2, "choices", "3 choices"),
        ("one_is_corrupt", 1, "damaged", "1 damaged, such as"),
        ("one_has_none", 3, "none", "nothing tuned"),
        ("one_raises", 0, "failed", "PermissionError"),
    ],
)
def test_one_rank_that_differs_takes_all_to_the_heuristic_order(job, scenario, who, standing, why):
    ranks = seen(job, scenario)
    assert [rank["ok"] for rank in ranks] == [False] * RANKS
    assert [rank["chose"][:3] for rank in ranks] == [["quick", {"tile": 4}, "heuristic"]] * RANKS
    for rank in ranks:
        expected = ["choices"] * RANKS
        expected[who] = standing
        assert rank["standings"] == expected
        assert f"rank {who}: {standing}" in rank["reason"]
        assert why in rank["reason"]
        assert rank["chose"][4] == [f"not tuned: {rank['reason']}"], "explain repeats the reason"
    assert len({rank["reason"] for rank in ranks}) == 1


def test_ranks_without_anything_agree_on_nothing(job):
    for rank in seen(job, "nobody_has_any"):
        assert rank["ok"]
        assert rank["chose"][:3] == ["quick", {"tile": 4}, "heuristic"]
        assert rank["later"] == ["quick", {"tile": 4}]


def test_a_pinned_plan_counts_like_a_store_with_the_same_choices(job):
    for rank in seen(job, "one_pins_what_others_stored"):
        assert rank["ok"]
        assert rank["chose"][:3] == ["quick", {"tile": 8}, "plan"]


def test_equal_shipped_tables_count_where_nothing_was_tuned(job):
    for rank in seen(job, "equal_tables_alone"):
        assert (rank["ok"], rank["tables"]) == (True, True)
        assert rank["chose"][:3] == ["quick", {"tile": 8}, "tuned-shipped"]
        assert (rank["missed"][1], rank["missed"][3]) == ("tuned-shipped", {"tile": 8})


def test_the_plan_that_ranks_agree_on_comes_before_their_tables(job):
    for rank in seen(job, "equal_tables_and_stores"):
        assert (rank["ok"], rank["tables"]) == (True, True)
        assert rank["chose"][2] == "plan"
        assert (rank["missed"][1], rank["missed"][3]) == ("tuned-shipped", {"tile": 8}), "it is not in the plan"


def test_ranks_without_a_common_plan_go_by_the_tables_they_have_in_common(job):
    for rank in seen(job, "equal_tables_and_one_chose_otherwise"):
        assert (rank["ok"], rank["tables"]) == (False, True)
        assert rank["chose"][:3] == ["quick", {"tile": 8}, "tuned-shipped"]
        assert "all use what isokern ships and the heuristic order" in rank["reason"]


def test_tables_that_one_rank_has_otherwise_count_for_none(job):
    for rank in seen(job, "one_ships_others"):
        assert (rank["ok"], rank["tables"]) == (True, False)
        assert rank["chose"][:3] == ["quick", {"tile": 4}, "heuristic"]
        assert "shipped tables are not used: the ranks have others" in rank["reason"]
        assert "4 ranks have agreed on" in rank["chose"][4][0]


def test_a_package_that_is_updated_under_a_running_job_changes_nothing(job):
    for scenario in ("equal_tables_alone", "equal_tables_and_stores", "equal_tables_and_one_chose_otherwise"):
        for rank in seen(job, scenario):
            as_shipped, shipped_since = rank["later_missed"]
            assert as_shipped == ["tuned-shipped", {"tile": 8}]
            assert shipped_since == ["heuristic", {"tile": 4}]


def test_one_damaged_store_shared_by_all_is_still_one_store(job):
    for rank in seen(job, "all_share_a_damaged_store"):
        assert rank["ok"]
        assert rank["standings"] == ["damaged"] * RANKS


def test_ranks_whose_heuristics_differ_all_raise(job):
    ranks = seen(job, "one_forces_a_backend")
    assert len({rank["raised"] for rank in ranks}) == 1
    assert "ISOKERN_BACKEND_" in ranks[0]["raised"]
    assert "ranks 3:" in ranks[0]["raised"]


def test_a_process_alone_agrees_with_itself(tmp_path):
    rank_script.choose(tmp_path, 8)
    registry = rank_script.registry_at(tmp_path)
    agreement = agree(registry, device="cpu")
    assert agreement.ok
    assert len(agreement.ranks) == 1
    decision = registry.dispatcher("toy").decide(rank_script.TOY.Size(2))
    assert decision.rule is Rule.PLAN
    assert agreement.content_hash in render(decision)


def test_the_message_has_one_size_whatever_the_reason_is():
    states = [RankState(Standing.FAILED, *[""] * 4, detail) for detail in ("", "x" * 10_000, "\U0001f600\n" * 5_000)]
    messages = [state.to_message() for state in states]
    assert [len(message) for message in messages] == [MESSAGE_BYTES] * 3
    assert [RankState.from_message(message).standing for message in messages] == [Standing.FAILED] * 3


# ---- pinning


@pytest.fixture
def planned(tmp_path):
    """A registry over an empty store, and the file of a plan for it."""
    rank_script.choose(tmp_path / "tuned", 8)
    tuned = rank_script.registry_at(tmp_path / "tuned")
    plan = Plan.from_store(tuned.store, tuned.environment("cpu"))
    plan.save(tmp_path / "plan.json")
    return rank_script.registry_at(tmp_path / "empty"), plan, tmp_path / "plan.json"


def rule_of(registry) -> Rule:
    return registry.dispatcher("toy").decide(rank_script.TOY.Size(2)).rule


def test_a_plan_file_is_pinned_by_its_content_hash_and_unpinned(planned):
    registry, plan, file = planned
    registry.pin(file, content_hash=plan.content_hash)
    assert registry.plan == plan
    assert rule_of(registry) is Rule.PLAN
    registry.pin(None)
    assert rule_of(registry) is Rule.HEURISTIC


def test_another_hash_is_refused_and_the_pinned_plan_stays(planned):
    registry, plan, file = planned
    registry.pin(file)
    with pytest.raises(PlanError, match=f"expected plan 0123456789abcdef, given plan {plan.content_hash}"):
        registry.pin(file, content_hash="0123456789abcdef")
    assert registry.plan == plan


def test_another_machines_plan_is_refused_with_the_difference(planned):
    registry, plan, _ = planned
    there = dataclasses.replace(plan.environment, threads=7, labels=(("product", "Epyc 9"),))
    with pytest.raises(PlanError, match=r"for Epyc 9, this is .*threads: plan 7, here 1"):
        registry.pin(Plan(there, plan.choices))


def test_another_gpus_plan_is_refused_where_there_is_none(planned):
    registry, plan, _ = planned
    h100 = Environment("cuda", CudaSilicon("9.0", 132, 80), 0, "13.0", (), "3.12", labels=(("product", "H100"),))
    with pytest.raises(PlanError, match="was made for H100"):
        registry.pin(Plan(h100, plan.choices))
    assert registry.plan is None


def test_the_difference_of_two_plans_is_by_key(planned):
    _, plan, _ = planned
    first, *rest = plan.choices
    other = Plan(plan.environment, (dataclasses.replace(first, config={"tile": 4}), *rest))
    [(name, (mine, theirs))] = plan.diff(other).items()
    assert name == f"toy/{first.key_hash}"
    assert "tile=8" in mine
    assert "tile=4" in theirs
    assert plan.diff(plan) == {}


def test_a_sealed_store_still_shows_what_is_in_it(tmp_path):
    rank_script.choose(tmp_path, 8)
    registry = rank_script.registry_at(tmp_path)
    agree(registry, device="cpu")
    assert isinstance(registry.store, Store)
    assert registry.store.peek("toy", 1, {"n": 2}, registry.environment("cpu")).backend == "quick"
