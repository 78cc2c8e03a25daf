"""What explain says beyond the decision: why the tuned choice won, and on a miss what comes nearest."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from isokern.cache import CandidateRecord
from isokern.registry.explain import explanation


def load_script():
    """The toy op and its stores, shared with the tests of agreement."""
    if "agreeing_rank" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "agreeing_rank", Path(__file__).with_name("agreeing_rank.py")
        )  # fmt: skip
        sys.modules["agreeing_rank"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["agreeing_rank"]


toy = load_script()


def explain(registry, n: int) -> str:
    problem = toy.TOY.Size(n)
    parts = explanation(registry.dispatcher("toy").decide(problem), registry, problem)
    out = io.StringIO()
    console = Console(file=out, width=200, color_system=None)
    for part in parts:
        console.print(part, markup=False, highlight=False)
    return out.getvalue()


@pytest.fixture
def tuned(tmp_path):
    """A registry whose store holds a choice for n = 2 with a rival of each kind."""
    toy.choose(tmp_path, 8, keys=(2,))
    registry = toy.registry_at(tmp_path)
    [located] = registry.store.entries()
    won = dataclasses.replace(located.entry.candidates[0], median_us=10.0, samples_us=(9.0, 10.0, 11.0))
    slow = CandidateRecord("slow", {}, "rejected", "slow", "2.5x the best", 25.0, (25.0,), "old")
    wrong = CandidateRecord("quick", {"tile": 4}, "rejected", "wrong", "off by 3 at [0, 1]")
    entry = dataclasses.replace(
        located.entry, candidates=(slow, wrong, won), margin_over_runner_up=1.5, rule="fastest: quick[tile=8]"
    )
    registry.store.put(entry, located.environment)
    registry.refresh()
    return registry


def test_a_tuned_problem_shows_why_its_choice_won_and_every_candidate(tuned):
    text = explain(tuned, 2)
    assert "tuned choice: quick[tile=8]: fastest: quick[tile=8]" in text
    assert "margin: +150.0 % over the runner-up, nothing to compare with over the default" in text
    rows = [line.split() for line in text[text.index("tuned candidates") :].splitlines()[2:]]
    assert rows[0] == ["->", "quick", "tile=8", "ok", "10", "1.00x", "3"]
    assert rows[1] == ["slow", "default", "rejected", "[slow]", "25", "2.50x", "1", "2.5x", "the", "best"]
    assert rows[2] == ["quick", "tile=4", "rejected", "[wrong]", "off", "by", "3", "at", "[0,", "1]"]


def test_what_has_changed_since_is_said(tuned):
    assert "changed since, so a new race could end differently: slow" in explain(tuned, 2)
    tuned._fingerprints["toy", "quick"] = "another"
    assert "does not count: 'quick' has changed since" in explain(tuned, 2)


def test_a_miss_shows_the_nearest_entry_and_the_fields_that_differ(tuned):
    text = explain(tuned, 3)
    assert "not tuned: the nearest entry" in text
    assert "with quick[tile=8], differs in" in text
    assert text.splitlines()[-1].split() == ["n", "3", "2"]


def test_a_store_of_another_environment_shows_what_changed(tuned):
    [located] = list(tuned.store.entries())
    there = dataclasses.replace(located.environment, versions=(("torch", "1.0"),))
    located.path.unlink()
    tuned.store.put(dataclasses.replace(located.entry, environment=there.hash), there)
    tuned.refresh()
    text = explain(tuned, 2)
    assert "no entry of this op for this environment" in text
    assert "versions.torch: '1.0' there" in text
