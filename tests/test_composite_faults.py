"""A composite without a fault passes the whole suite; taken apart or put together with one thing wrong, it fails."""

from __future__ import annotations

import pytest
import torch

from isokern.backends.composite import runner
from isokern.backends.composite.backend import Composite
from isokern.backends.composite.runner import CompositeRunner
from isokern.backends.composite.subcall import call_of
from isokern.registry.conformance.check import Status, Violation
from isokern.registry.conformance.exceptions import ExceptionEntry, Exceptions
from isokern.registry.conformance.runner import run_checks
from isokern.registry.conformance.subject import Subject
from isokern.registry.decision import Accepted
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.checks.compare import Recipe, accurate
from isokern.registry.varlen.layout import SequenceLayout
from isokern.registry.varlen.runs import Run

OP = "fused_sigmoid_gating"


class AnyClass(Composite):
    """For batches of any lengths: a single run goes to its part whole, so relations between batches can be examined."""

    name = "composite_of_any"

    def check(self, problem):
        if problem.grad or not problem.varlen or not problem.lengths_on_host:
            return super().check(problem)
        return Accepted()


# ---- faults in the call of a run: from the whole call, the run and its right call to a wrong one


def first_rows(call, run, right):
    """token tensors start at the batch's first row"""
    rows = run.span.stop - run.span.start
    return right.replace(**{name: getattr(call, name).narrow(1, 0, rows) for name in ("q", "k", "v", "a", "b")})


def first_rows_written(call, run, right):
    """the output is written to the batch's first rows"""
    return right.replace(out=call.out.narrow(1, 0, run.span.stop - run.span.start))


def gates_not_cut(call, run, right):
    """a is that of the batch's first rows"""
    return right.replace(a=call.a.narrow(1, 0, run.span.stop - run.span.start))


def other_slots(call, run, right):
    """slots are those of the batch's first sequences"""
    if call.read_slots is None:
        return right
    return right.replace(read_slots=call.read_slots.narrow(0, 0, run.span.last - run.span.first))


def other_written_slots(call, run, right):
    """separate slots to write are those of the batch's first sequences"""
    if call.update != "separate":
        return right
    return right.replace(write_slots=call.write_slots.narrow(0, 0, run.span.last - run.span.first))


def written_where_read(call, run, right):
    """separate slots are written where they were read"""
    return right if call.write_slots is None else right.replace(write_slots=right.read_slots)


def nothing_stored(call, run, right):
    """the states of long sequences are not stored"""
    return right.replace(write_slots=None) if run.span.long else right


def other_rows(call, run, right):
    """intermediate states go to the rows of the batch's first sequences"""
    if call.intermediate_rows is None:
        return right
    return right.replace(intermediate_rows=call.intermediate_rows.narrow(0, 0, run.span.last - run.span.first))


def other_parents(call, run, right):
    """the token trees are those of the batch's first sequences"""
    if call.parents is None:
        return right
    return right.replace(parents=call.parents.narrow(0, 0, run.span.last - run.span.first))


def lengths_not_cut(call, run, right):
    """the offsets are those of the batch's first sequences"""
    whole = SequenceLayout(call.offsets, call.cu_seqlens)
    count, rows = run.span.last - run.span.first, run.span.stop - run.span.start
    offsets = tuple(min(x, rows) for x in whole.offsets[: count + 1])
    layout = SequenceLayout(offsets, torch.tensor(offsets, dtype=whole.cu_seqlens.dtype))
    return call_of(call, Run(run.span, layout))


def device_offsets_not_rebased(call, run, right):
    """the offsets on the device are not those on the host: they still count from the batch's start"""
    rows, start = run.span.stop - run.span.start, run.span.start
    cu = (run.layout.cu_seqlens + start).clamp(max=rows)
    return call_of(call, Run(run.span, SequenceLayout(run.layout.offsets, cu)))


CALL_FAULTS = {
    f.__name__: f
    for f in (
        first_rows,
        first_rows_written,
        gates_not_cut,
        other_slots,
        other_written_slots,
        written_where_read,
        nothing_stored,
        other_rows,
        other_parents,
        lengths_not_cut,
        device_offsets_not_rebased,
    )
}


# ---- faults in what is run: from the right work to a wrong one


def last_run_dropped(work):
    """the last run is not run"""
    return work[:-1]


def first_run_dropped(work):
    """the first run is not run"""
    return work[1:]


def one_run_per_side(work):
    """of several runs on one side only the first is run"""
    return list({long: (long, run, part) for long, run, part in reversed(work)}.values())


def run_twice(work):
    """a run is run twice"""
    return [*work, work[-1]]


WORK_FAULTS = {f.__name__: f for f in (last_run_dropped, first_run_dropped, one_run_per_side, run_twice)}

#: In the suite's own trees only the first run of a batch goes back to a parent.
TREE = CaseSpec("a tree behind other rows", (1, 1, 9, 8, 1), h=1, hv=2, k=16, v=24, verify="tree")

#: The check, or the case, that has to reject each fault; many are rejected by others as well.
KILLED_BY = {
    "first_rows": "N1",
    "first_rows_written": "N1",
    "gates_not_cut": "N1",
    "other_slots": "N1",
    "other_written_slots": "C4",
    "written_where_read": "C4",
    "nothing_stored": "N1",
    "other_rows": "C1",
    "other_parents": "a tree behind other rows",
    "lengths_not_cut": "N1",
    "device_offsets_not_rebased": "N1",
    "last_run_dropped": "N1",
    "first_run_dropped": "N1",
    "one_run_per_side": "M4",
    "run_twice": "N1",
}


@pytest.fixture
def plant(monkeypatch):
    """``plant(fault)``: a composite with this fault until the test ends; "" plants none."""

    def planted(fault: str) -> Composite:
        if fault in CALL_FAULTS:
            monkeypatch.setattr(runner, "call_of", lambda call, run: CALL_FAULTS[fault](call, run, call_of(call, run)))
        elif fault:
            right = CompositeRunner._work

            def work(self, call):
                found = right(self, call)
                return WORK_FAULTS[fault](found) if len(found) > 1 else found

            monkeypatch.setattr(CompositeRunner, "_work", work)
        return AnyClass()

    return planted


#: As for any backend that adds in another order in other batches: here another part may run a sequence.
EXCUSED = Exceptions(
    {
        check: ExceptionEntry(check, 2.0, "its parts' order of addition", True)
        for check in ("M2", "M3", "M4", "M5", "M6", "S5", "C1", "C2")
    }
)


def examined(backend: Composite, **options):
    return run_checks(OP, backend, exceptions=EXCUSED, peers=(), **options)


def test_without_a_fault_everything_passes(plant, conformance):
    report = examined(plant(""))
    conformance(report)
    assert report.ok, report.describe_failures()
    assert {f.status for f in report.findings} <= {Status.PASS, Status.DECLINED}
    examined_here = {f.check for f in report.findings if f.status is Status.PASS}
    assert {"M2", "M3", "M4", "M11", "M12", "S7", "C1", "C2"} <= examined_here


def test_without_a_fault_a_tree_behind_other_rows_is_right(plant):
    assert accurate(Subject(plant("")), Recipe(TREE)) <= 1


def test_every_fault_has_its_check():
    assert set(KILLED_BY) == {*CALL_FAULTS, *WORK_FAULTS}


@pytest.mark.parametrize("fault", KILLED_BY)
def test_rejected(fault, plant, record_property):
    by, words = KILLED_BY[fault], ({**CALL_FAULTS, **WORK_FAULTS}[fault].__doc__ or "").strip()
    if by == TREE.name:
        with pytest.raises(Violation):
            accurate(Subject(plant(fault)), Recipe(TREE))
    else:
        report = examined(plant(fault), only=[by])
        found = [f for f in report.findings if f.status is Status.FAIL]
        assert found, f"{by} passes {fault}: {words}"
        assert any("raised" not in f.message for f in found), "a crash is no rejection of a wrong result"
    record_property("planted fault", f"composite   {fault:40} rejected by {by:4} {words}")
