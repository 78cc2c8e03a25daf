"""``isokern plan``: export, show, check, diff; their exit codes and what they say."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

from isokern import registry
from isokern.cache import CandidateRecord, Choice, Entry, Layer, Plan, Store, current_environment
from isokern.cache.plan_cli import app
from isokern.errors import PlanError

OP = "fused_sigmoid_gating"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def exported(tmp_path):
    """A plan of one choice, exported from a store by the command."""
    environment = current_environment("cpu")
    prints = registry.default.fingerprint(OP, "torch_reference")
    measured = {"policy": "eager", "method": "", "launches": 0, "seconds": 0.0, "created": "2026-01-01", "isokern": "0"}
    candidates = (CandidateRecord("torch_reference", {}, "ok", fingerprint=prints),)
    entry = Entry(
        OP, 1, {"n": 8, "k": 64}, "torch_reference", {}, None, None, "", candidates, measured, environment.hash
    )
    Store([Layer("explicit", tmp_path / "store", writable=True)]).put(entry, environment)
    done = run("export", tmp_path / "plan.json", "--root", tmp_path / "store", "--device", "cpu")
    assert done.exit_code == 0, done.output
    return tmp_path / "plan.json"


def test_what_is_exported_is_what_the_store_answers_with(exported):
    plan = Plan.load(exported)
    assert [choice.label for choice in plan.choices] == ["torch_reference[default]"]


def test_show_names_hash_place_and_choices(exported):
    done = run("show", exported)
    assert Plan.load(exported).content_hash in done.output
    assert current_environment("cpu").describe() in done.output
    assert "torch_reference[default]" in done.output


def test_check_says_yes_here_and_no_with_the_difference_elsewhere(exported, tmp_path):
    plan = Plan.load(exported)
    assert run("check", exported, "--device", "cpu", "--hash", plan.content_hash).exit_code == 0
    other = run("check", exported, "--device", "cpu", "--hash", "0123456789abcdef")
    assert other.exit_code == 1
    assert "expected plan 0123456789abcdef" in other.output
    Plan(dataclasses.replace(plan.environment, threads=99), plan.choices).save(tmp_path / "there.json")
    there = run("check", tmp_path / "there.json", "--device", "cpu")
    assert there.exit_code == 1
    assert "threads: plan 99" in there.output


def test_diff_compares_choices_and_environments(exported, tmp_path):
    plan = Plan.load(exported)
    assert run("diff", exported, exported).exit_code == 0
    choice = Choice(OP, 1, {"n": 8, "k": 64}, "torch_chunked", {}, "f")
    Plan(dataclasses.replace(plan.environment, threads=99), (choice,)).save(tmp_path / "other.json")
    done = run("diff", exported, tmp_path / "other.json")
    assert done.exit_code == 1
    assert "torch_chunked[default]" in done.output
    assert "environment.threads" in done.output


def test_a_file_that_is_no_plan_is_a_typed_error(tmp_path):
    done = run("show", tmp_path / "none.json")
    assert isinstance(done.exception, PlanError)


def test_check_of_a_file_that_is_not_there_is_no_answer(tmp_path):
    """1 would say that the plan was refused."""
    done = run("check", tmp_path / "none.json")
    assert isinstance(done.exception, PlanError)
    assert "no such file" in str(done.exception)
