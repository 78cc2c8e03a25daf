"""A table that travels in the wheel decides in the first call of a fresh process that has tuned nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import isokern
from isokern.cache import CandidateRecord, Entry, Layer, Store, current_environment
from isokern.registry.core import Registry
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec

OP = "fused_sigmoid_gating"
ROOT = Path(isokern.__file__).parent
LENGTHS = {"chosen": (3, 9), "next best": (1, 1, 1, 1)}
NOT_COPIED = ("tests", "benchmarks", "docs", "examples", "build", "dist", "site", ".*", "*.egg-info", "__pycache__")

CALL = """
import contextlib, io, json, sys
from isokern import registry
import isokern
assert not any(name.startswith("isokern.cache") for name in sys.modules), "read at import"
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec

op, spec = registry.get("fused_sigmoid_gating"), registry.spec("fused_sigmoid_gating")
seen = {}
for name, lengths in json.loads(sys.argv[1]).items():
    call = spec.make_inputs(CaseSpec(name, tuple(lengths)), 0).kwargs
    op(**call)
    [bound] = registry.default.dispatcher(op.name).bound.values()
    decision = bound.decision
    with contextlib.redirect_stdout(io.StringIO()) as explained:
        op.explain(**call)
    seen[name] = {
        "rule": decision.rule, "backend": decision.backend, "config": decision.config, "detail": decision.detail,
        "notes": decision.notes, "explain": explained.getvalue(),
    }
    registry.use_store(None)
sources = registry.default.source_fingerprints(op.name)
print(json.dumps({"file": isokern.__file__, "seen": seen, "sources": sources}))
"""


def problem_of(registry, lengths):
    """What a call of these lengths is looked up by."""
    registry.use_store(Store([]))  # forgets what was bound
    call = registry.spec(OP).make_inputs(CaseSpec("x", lengths), 0).kwargs
    registry.get(OP)(**call, backend="torch_vectorized")
    [(problem, _)] = registry.dispatcher(OP).bound
    return problem


def fabricate(root):
    """A table for this CPU as another machine with older libraries would have made it.

    Returns: source fingerprints of this checkout; the config that the table chooses.
    """
    registry = Registry(load_plugins=False)
    here = current_environment("cpu")
    there = dataclasses.replace(here, versions=(("torch", "2.7.0"),))
    sources = registry.source_fingerprints(OP)

    def row(name, us, **values):
        return CandidateRecord(name, values, "ok", None, None, us, (us,), "0" * 16, source=sources[name])

    fields = {name: problem_of(registry, lengths) for name, lengths in LENGTHS.items()}
    vectorized = dict(registry.backends(OP)["torch_vectorized"].configs(fields["chosen"])[-1].to_dict())
    rows = {
        "chosen": (row("torch_vectorized", 1.0, **vectorized), row("numba_cpu", 2.0, v_tile=16)),
        "next best": (row("cupy", 1.0), row("torch_reference", 3.0), row("torch_vectorized", 4.0, **vectorized)),
    }
    for name, problem in fields.items():
        first = rows[name][0]
        entry = Entry(
            op=OP, contract_version=registry.spec(OP).contract_version, key=problem.tuning_key(),
            backend=first.backend, config=dict(first.config), margin_over_runner_up=None, margin_over_default=None,
            rule="made up", candidates=rows[name], environment=there.hash,
            measured={"policy": "eager", "method": "made up", "launches": 1, "seconds": 1.0,
                      "created": "2026-01-01T00:00:00+00:00", "isokern": "0"},
        )  # fmt: skip
        Layer("shipped", root).write(entry, there)
    return sources, vectorized


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but a wheel of a copy of this tree, which has a table; and what the table says."""
    tree, dist, site = (tmp_path_factory.mktemp(name) for name in ("tree", "dist", "site"))
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
    shutil.rmtree(tree / "cache" / "tables", ignore_errors=True)
    made = fabricate(tree / "cache" / "tables")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [wheel] = dist.glob("*.whl")
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site, *made


def run(site, home, *words):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ISOKERN_")}
    environment |= {"PYTHONPATH": str(site), "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    environment |= {"ISOKERN_SITE_CACHE": str(home / "site")}
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=home, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def seen(installed, tmp_path_factory):
    site, *_ = installed
    found = json.loads(run(site, tmp_path_factory.mktemp("home"), "-c", CALL, json.dumps(LENGTHS)).splitlines()[-1])
    assert Path(found["file"]).is_relative_to(site), "not the checkout"
    return found


def test_it_decides_the_first_call(seen, installed):
    *_, config = installed
    first = seen["seen"]["chosen"]
    assert (first["rule"], first["backend"]) == ("tuned-shipped", "torch_vectorized")
    assert first["config"] == config
    assert any(
        f"torch 2.7.0, here {dict(current_environment('cpu').versions)['torch']}" in note for note in first["notes"]
    )


def test_explain_says_so(seen):
    text = seen["seen"]["chosen"]["explain"]
    assert "rule: tuned-shipped (shipped table of" in text


def test_a_choice_that_cannot_run_gives_way_to_the_next_best_of_its_table(seen):
    second = seen["seen"]["next best"]
    assert (second["rule"], second["backend"]) == ("tuned-shipped", "torch_reference")
    assert "which took 3.00 times as long" in second["detail"]
    assert any("its choice cupy[default] does not apply" in note for note in second["notes"])


def test_the_sources_of_a_wheel_are_those_of_the_checkout(seen, installed):
    _, sources, _ = installed
    assert {name: seen["sources"][name] for name in sources} == sources


def test_the_command_line_lists_and_verifies_it(installed, tmp_path):
    site, *_ = installed
    listed = run(site, tmp_path, "-m", "isokern", "cache", "list", "--layer", "shipped")
    assert "2 entries" in listed
    assert "3 files, 0 invalid" in run(site, tmp_path, "-m", "isokern", "cache", "verify")
