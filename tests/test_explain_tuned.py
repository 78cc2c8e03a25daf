"""What explain says beyond the decision: why the tuned choice won, and on a miss what comes nearest."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from isokern import cli, registry
from isokern.cache import CandidateRecord, Layer, Store
from isokern.cache.environment import Environment
from isokern.cache.silicon import CudaSilicon
from isokern.registry.decision import Decision, Rule
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


def test_a_choice_of_another_layer_that_counts_is_shown_and_not_one_that_has_changed_since(tmp_path):
    toy.choose(tmp_path / "user", 4, keys=(2,))
    toy.choose(tmp_path / "site", 8, keys=(2,))
    registry = toy.registry_at(tmp_path / "user")
    [located] = registry.store.entries()
    changed = dataclasses.replace(located.entry.candidates[0], fingerprint="0" * 16)
    registry.store.put(dataclasses.replace(located.entry, candidates=(changed,)), located.environment)
    registry.use_store(Store([Layer("user", tmp_path / "user"), Layer("site", tmp_path / "site")]))
    text = explain(registry, 2)
    assert "tuned-site" in text
    assert "tuned choice: quick[tile=8]" in text
    assert "does not count" not in text


class TestTheCommandOnAGpu:
    H100 = Environment("cuda", CudaSilicon("9.0", 132, 79), 0, "13.0", (), "3.12", (("product", "H100"),))

    @pytest.fixture
    def on_an_h100(self, monkeypatch):
        """``isokern explain`` where there would be one; what it decided, for which problem."""
        decided = []
        dispatcher = registry.default.dispatcher("fused_sigmoid_gating")

        def decide(problem, backend=None):
            decided.append(problem)
            return Decision("fused_sigmoid_gating", {}, (), "cupy", {}, Rule.HEURISTIC, "made up", ())

        monkeypatch.setattr(cli, "_device", lambda name: "cuda")
        monkeypatch.setattr(registry.default, "environment", lambda device: self.H100)
        monkeypatch.setattr(dispatcher, "decide", decide)
        return decided

    @pytest.mark.parametrize("policy", ["eager", "graph"])
    def test_the_problem_is_the_one_that_a_call_there_would_have(self, on_an_h100, policy):
        arguments = ["--model", "qwen3-next-80b-a3b", "--case", "decode N=4", "--policy", policy]
        done = CliRunner().invoke(cli.app, ["explain", *arguments])
        assert done.exit_code == 0, done.output
        [problem] = on_an_h100
        assert (problem.device, problem.arch, problem.mode) == ("cuda", 90, policy)

    def test_a_cpu_has_no_graphs(self):
        arguments = ["--model", "qwen3-next-80b-a3b", "--case", "decode N=4", "--policy", "graph", "--device", "cpu"]
        done = CliRunner().invoke(cli.app, ["explain", *arguments])
        assert done.exit_code != 0
        assert "--policy" in str(done.exception)
