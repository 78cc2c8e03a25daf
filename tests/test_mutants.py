"""The suite rejects every planted fault by the check made for it, and passes the same code without a fault."""

from __future__ import annotations

import pytest
import torch

from isokern.errors import UnknownNameError
from isokern.registry.conformance.check import Status
from isokern.registry.conformance.runner import run_checks
from isokern.registry.ops.fused_sigmoid_gating.mutants import MUTANTS, mutant

OP = "fused_sigmoid_gating"

#: The check that has to reject each fault. Many are rejected by others as well; where only this one does, losing
#: it would let the fault through.
KILLED_BY = {
    # the formula
    "naive_softplus": "N5",
    "thr5": "N1",
    "relu": "N1",
    "no_threshold": "C10",
    "threshold_on_x": "C10",
    "no_softplus_beta": "C10",
    "rate_overflows": "N8",
    "eps1e-5": "N6",
    "eps_outside": "N6",
    "eps_in_mean": "N6",
    "no_l2q": "N1",
    "always_l2": "C10",
    "scale_before_norm": "M7",
    "no_scale": "M7",
    "no_bias_head0": "M5",
    "kda_gate_channel0": "N7",
    "kda_gate_head0": "M5",
    "exp2": "N1",
    "no_lower_bound": "C10",
    "lower_bound_-5": "C10",
    "no_neg_eigval": "C10",
    "gqa_mod": "M5",
    "gate_after": "M10",
    "out_before": "M10",
    "last_head": "M5",
    "beyond16": "M3",
    "keys_beyond128": "C11",
    "values_beyond128": "C11",
    # its precision
    "trunc": "N3",
    "trunc_state": "N7",
    "g_bf16": "N1",
    "x_bf16": "N1",
    "A_log_bf16": "N1",
    "beta_bf16": "N1",
    "tf32": "N1",
    "h_bf16": "N1",
    "qk_bf16": "N1",
    "out_fp16": "M9",
    # layouts, offsets, slots
    "h0_transposed": "N1",
    "layout_ignored": "C6",
    "skip_last": "S1",
    "past_the_end": "M2",
    "neg_wraps": "M11",
    "neg_before_pool": "M11",
    "padding_writes_slot0": "S2",
    "padding_reads_slot0": "M11",
    "padding_times_zero": "C5",
    "padding_skipped": "M11",
    "fresh_not_stored": "C5",
    "zero_len_clears": "M11",
    "zero_len_copies": "C4",
    "leaked_state": "M2",
    "no_output_slots": "C4",
    "updates_anyway": "C3",
    "int32_slots": "M12",
    "int32_rows": "C2",
    "int32_offsets": "M12",
    "slot_offset_wraps": "S6",
    "dense_q": "M12",
    "dense_vectors": "M12",
    "dense_pool": "M12",
    "dense_steps": "C17",
    "dense_out": "C8",
    "max_seqlen_is_length": "M12",
    # verification
    "steps_kv": "C6",
    "steps_late": "C1",
    "steps_cleared": "S2",
    "steps_row_n": "C1",
    "row_wraps": "S2",
    "padding_keeps_no_steps": "C17",
    "no_row_no_store": "C17",
    "tree_as_chain": "C2",
    "tree_root_zero": "C2",
    # memory and memories
    "q_in_place": "S2",
    "nan_tail": "S1",
    "last_row": "S1",
    "clears_tail": "S1",
    "no_out": "C8",
    "accumulates": "S1",
    "not_repeatable": "M1",
    "stale": "S3",
    "stale_slots": "S3",
    "stale_offsets": "S3",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are small: handing them to threads costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_fault_has_its_check():
    assert set(KILLED_BY) == set(MUTANTS)


def test_without_a_fault_everything_passes():
    report = run_checks(OP, mutant(""), peers=())
    assert report.ok, report.describe_failures()
    assert {f.status for f in report.findings} <= {Status.PASS, Status.DECLINED}


@pytest.mark.parametrize("name", KILLED_BY)
def test_rejected(name, record_property):
    report = run_checks(OP, mutant(name), only=[KILLED_BY[name]], peers=(), fail_fast=True)
    found = [f for f in report.findings if f.status is Status.FAIL]
    assert found, f"{KILLED_BY[name]} passes {name}: {MUTANTS[name]}\n{report.describe_failures()}"
    assert "raised" not in found[0].message, "a crash is no rejection of a wrong result"
    by = f"rejected by {found[0].check:4} {found[0].case:36.36}"
    record_property("planted fault", f"a backend   {name:40} {by} {MUTANTS[name]}")


def test_an_unknown_fault_is_named():
    with pytest.raises(UnknownNameError, match="gqa_mod"):
        mutant("gqa_mot")
