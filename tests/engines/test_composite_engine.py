"""Composites of the CUDA C++ backends in the CPU engine: rows that walk beside prompts that round, or are cut."""

from dataclasses import replace

import pytest

from isokern.backends.composite import runner
from isokern.backends.composite.subcall import call_of
from isokern.engines.cuda_on_cpu.backend import CupyOnCpu
from isokern.engines.cuda_on_cpu.chunked import CupyChunkedBf16OnCpu, CupyCutBf16OnCpu, CupyCutOnCpu
from isokern.engines.cuda_on_cpu.composite import CompositeBf16OnCpu, CompositeOnCpu
from isokern.engines.cuda_on_cpu.engine import CudaOnCpu
from isokern.registry.backend import Chunked
from isokern.registry.conformance.check import Status
from isokern.registry.conformance.gate import gate
from isokern.registry.conformance.runner import run_checks
from isokern.registry.conformance.subject import chunk_of
from isokern.registry.decision import RejectCode
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

pytestmark = pytest.mark.engine("cuda_on_cpu")
OP = "fused_sigmoid_gating"
SPEC = CaseSpec("rows and prompts", (1,) * 9 + (200, 40), h=1, hv=2, k=16, v=24, as_layout=True)
#: The same buckets: two of the run's sequences are long, so that it would be cut elsewhere by itself.
OTHER = replace(SPEC, lengths=(1,) * 9 + (130, 110))
CUT = {
    "composite": (CompositeOnCpu((CupyOnCpu(), CupyCutOnCpu())), Chunked(64, False, 64)),
    "composite_bf16": (CompositeBf16OnCpu((CupyOnCpu(), CupyCutBf16OnCpu())), Chunked(64, True, 64)),
}


def test_conforms(conforms, engine_check):
    conforms("composite_bf16", engine_check)


@pytest.mark.parametrize("name", CUT)
def test_a_cut_part_passes_the_gate(name):
    both, bound = CUT[name]
    config = both.configs(describe(SPEC, "cpu"))[0]
    assert chunk_of(both, config) == bound
    result = gate(OP, both, config, SPEC, adversarial=OTHER)
    assert result.ok, result.reason
    assert result.worst_ratio > 0.01, "the bound means something"


@pytest.mark.parametrize("check", ["N3", "S4E"])
def test_the_suite_with_a_cut_part(check):
    report = run_checks(OP, CUT["composite"][0], only=[check], engine=CudaOnCpu())
    assert not report.failures, report.describe_failures()
    assert any(f.status is Status.PASS for f in report.findings)


@pytest.mark.parametrize("part", [CupyChunkedBf16OnCpu, CupyCutBf16OnCpu])
def test_a_rounded_part_with_the_wrong_rows_is_rejected(part, monkeypatch, record_property):
    def first_rows(call, run):
        rows = run.span.stop - run.span.start
        return call_of(call, run).replace(v=call.v.narrow(1, 0, rows))

    both = CompositeBf16OnCpu((CupyOnCpu(), part()))
    config = both.configs(describe(SPEC, "cpu"))[0]
    monkeypatch.setattr(runner, "call_of", first_rows)
    assert gate(OP, both, config, SPEC, adversarial=OTHER).code is RejectCode.WRONG
    record_property("planted fault", f"composite_bf16   {part.name + ' gets the first rows':40} rejected by the gate")
