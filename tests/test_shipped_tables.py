"""The tables that travel in the package: whole, of this contract, and what a fresh install on their silicon runs by."""

from __future__ import annotations

import pytest

from isokern.cache.audit import check_layer
from isokern.cache.layer import Layer
from isokern.cache.shipped import SHIPPED, is_current
from isokern.cache.silicon import CudaSilicon
from isokern.cache.store import Store
from isokern.registry import Registry
from isokern.registry.decision import Rule
from isokern.registry.ops.fused_sigmoid_gating.catalogue import model
from isokern.registry.ops.fused_sigmoid_gating.concrete import concrete
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Tier
from isokern.registry.ops.fused_sigmoid_gating.workloads import serving_cases

OP = SPEC.name
[LAYER] = [layer for layer in Store.default().layers if layer.name == SHIPPED]
ENTRIES = list(Store([LAYER]).entries())
H100 = CudaSilicon("9.0", 132, 79)
MODEL = model("qwen3-next-80b-a3b")


@pytest.fixture
def on_an_h100(monkeypatch, tmp_path):
    """A registry with nothing tuned, on a machine with the silicon of the H100's table and other libraries."""
    made = Registry(load_plugins=False)
    made.use_store(Store([Layer("user", tmp_path, writable=True), LAYER]))
    table = next(e.environment for e in ENTRIES if e.environment is not None and e.environment.silicon == H100)
    monkeypatch.setattr(made, "environment", lambda device: table)
    return made


def test_every_file_is_whole():
    found = list(check_layer(LAYER))
    assert found
    assert [checked for checked in found if checked.problem] == []


def test_every_entry_is_of_this_contract_and_of_a_machine_that_is_known_by_its_silicon_alone():
    for item in ENTRIES:
        assert item.entry.contract_version == SPEC.contract_version
        assert item.environment is not None
        assert all(c.source for c in item.entry.candidates if c.samples_us), "or no other version could read it"


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_a_fresh_install_dispatches_a_models_batches_from_the_table(on_an_h100, tp, mode):
    """Rows of kernels that were edited since the table was made do not count; all others do."""
    prints, sources = on_an_h100.fingerprints(OP), on_an_h100.source_fingerprints(OP)
    table = on_an_h100.store.tables(on_an_h100.environment("cuda"))[0]
    problems = [describe(concrete(MODEL.shard(tp), case), "cuda", 90, mode) for case in serving_cases(MODEL, Tier.WIDE)]
    found = [(p, on_an_h100.store.in_table(table, OP, SPEC.contract_version, p.tuning_key())) for p in problems]
    rows = [(problem, located.entry) for problem, located in found if located is not None]
    assert len(rows) > 0.5 * len(problems), "decode, drafts and short prompts at least"
    for problem, entry in rows:
        if is_current(entry.chosen, prints, sources):
            decision = on_an_h100.dispatcher(OP).decide(problem)
            assert decision.rule is Rule.TUNED_SHIPPED, problem.label
            assert (decision.backend, decision.config) == (entry.backend, dict(entry.config)), problem.label


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_it_never_leaves_a_kernel_that_was_edited_since_for_one_far_slower(on_an_h100, mode):
    """Where a row is not current the heuristic order decides, or one of about its time: never PyTorch's operations."""
    for tp in (1, 2, 4, 8):
        for case in serving_cases(MODEL, Tier.WIDE):
            problem = describe(concrete(MODEL.shard(tp), case), "cuda", 90, mode)
            decision = on_an_h100.dispatcher(OP).decide(problem)
            assert on_an_h100.backends(OP)[decision.backend].provenance != "torch", (problem.label, decision.detail)
