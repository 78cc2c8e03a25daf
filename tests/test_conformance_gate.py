"""The tuner's gate: correct candidates get through, every planted fault is rejected under its own code."""

from __future__ import annotations

import math

import pytest
import torch

from isokern.backends.torch_native.reference import run_reference
from isokern.registry.backend import Backend, Config
from isokern.registry.conformance.gate import gate
from isokern.registry.conformance.kept import Kept
from isokern.registry.decision import Accepted, RejectCode, Rejected
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.cases import BASE, CASES, adversarial
from isokern.registry.ops.fused_sigmoid_gating.checks.gating import GateTrial

OP = "fused_sigmoid_gating"
SMALL = CaseSpec("small", (4, 0, 2), k=16, v=12, extra_rows=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Candidate(Backend):
    """The reference, with something done before or after it."""

    op, name, provenance = OP, "candidate", "torch"

    def __init__(self, before=None, after=None):
        self.before, self.after = before, after
        self.runs = 0

    def check(self, problem):
        return Accepted()

    def bind(self, problem, config):
        def run(call):
            self.runs += 1
            if self.before:
                self.before(call)
            out = run_reference(call)
            if self.after:
                self.after(call)
            return out

        return run


def judge(candidate, case=SMALL, **options):
    return gate(OP, candidate, Config(), case, **options)


def raises(error):
    def explode(*_):
        raise error

    return explode


@pytest.mark.parametrize("case", CASES["core"], ids=lambda c: c.name)
def test_the_reference_gets_through_on_every_case(case):
    result = judge(Candidate(), case, seeds=(0,))
    assert result, result.reason
    assert result.repeatable is True
    assert result.worst_ratio <= 1


def test_two_seeds_an_adversarial_layout_and_three_runs_of_the_first():
    candidate = Candidate()
    assert judge(candidate)
    assert candidate.runs == 5


def scribble(call):
    call.pool[next(s for s in range(len(call.pool)) if s not in call.write_slots.tolist())][0, 0, 0] = 7


def scribble_guard(call):
    call.pool.as_strided((1,), (1,), call.pool.storage_offset() - 1).fill_(7)


FAULTS = {
    "wrong output": (lambda c: c.out[:, 0].mul_(1.01), RejectCode.WRONG),
    "wrong state": (lambda c: c.pool[int(c.write_slots[0])].mul_(1.01), RejectCode.WRONG),
    "NaN in one output": (lambda c: c.out[0, 0, 0, 0].fill_(math.nan), RejectCode.NON_FINITE),
    "infinite output": (lambda c: c.out[0, 0, 0, 0].fill_(math.inf), RejectCode.NON_FINITE),
    "modifies q": (lambda c: c.q.mul_(2), RejectCode.INPUT_MODIFIED),
    "modifies slots": (lambda c: c.cu_seqlens.copy_(c.cu_seqlens + 1), RejectCode.INPUT_MODIFIED),
    "writes an unnamed slot": (scribble, RejectCode.CANARY),
    "writes before the pool": (scribble_guard, RejectCode.CANARY),
    "writes rows beyond the last": (lambda c: c.out[:, -1].zero_(), RejectCode.CANARY),
    "writes behind the output": (
        lambda c: c.out.as_strided((1,), (1,), c.out.storage_offset() + c.out.numel()).fill_(1),
        RejectCode.CANARY,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_rejected_under_its_code(fault):
    after, code = FAULTS[fault]
    result = judge(Candidate(after=after))
    assert not result
    assert result.code is code, result
    assert result.reason


def test_a_candidate_that_writes_nothing_leaves_the_poison():
    candidate = Candidate()
    candidate.bind = lambda problem, config: lambda call: call.out
    assert judge(candidate).code is RejectCode.NON_FINITE


def test_runs_that_differ_by_one_bit_are_not_repeatable():
    runs = iter(range(9))

    def flip(call):  # the last bit of a float32 state: far within the error bound
        call.pool[int(call.write_slots[0])].view(torch.int32)[0, 0, 0].bitwise_xor_(next(runs) & 1)

    result = judge(Candidate(after=flip))
    assert (result.ok, result.code, result.repeatable) == (False, RejectCode.NOT_REPEATABLE, False)
    tolerated = judge(Candidate(after=flip), require_repeatable=False)
    assert (tolerated.ok, tolerated.repeatable) == (True, False)


def test_results_that_depend_on_stale_output_are_wrong():
    stale = []
    candidate = Candidate(
        before=lambda c: stale.append(float(c.out[0, 0, 0, 0])),
        after=lambda c: None if math.isnan(stale[-1]) else c.out.view(torch.int16)[0, 0, 0, 0].bitwise_xor_(1),
    )
    result = judge(candidate)
    assert result.code is RejectCode.WRONG
    assert "held before" in result.reason


def test_a_fault_of_the_second_seed_only_is_found():
    candidate = Candidate(after=lambda c: candidate.runs == 4 and c.out[:, 0].mul_(2))
    assert judge(candidate).code is RejectCode.WRONG


def test_a_fault_of_the_adversarial_layout_only_is_found():
    def wrong_when_empty_inside(call):
        lengths = call.cu_seqlens.diff().tolist()
        if lengths == [4, 0, 2]:
            call.out[:, 0].zero_()

    case = SMALL.but(lengths=(2, 4, 0))
    assert adversarial(case).lengths == (4, 0, 2)
    result = judge(Candidate(after=wrong_when_empty_inside), case)
    assert result.code is RejectCode.WRONG


def test_raising_is_told_apart_from_failing_to_compile_and_from_lack_of_memory():
    assert judge(Candidate(before=raises(OSError("boom")))).code is RejectCode.RAISED
    assert judge(Candidate(before=raises(MemoryError()))).code is RejectCode.MEMORY
    assert judge(Candidate(before=raises(torch.OutOfMemoryError("gpu")))).code is RejectCode.MEMORY
    unbuildable = Candidate()
    unbuildable.bind = raises(SyntaxError("bad kernel"))
    result = judge(unbuildable)
    assert result.code is RejectCode.COMPILE
    assert "bad kernel" in result.reason


def test_a_decline_keeps_its_own_code_and_reason():
    candidate = Candidate()
    candidate.check = lambda problem: Rejected(RejectCode.DTYPE, "no bfloat16")
    result = judge(candidate)
    assert (result.code, result.reason) == (RejectCode.DTYPE, "no bfloat16")


def test_a_predicate_that_raises_is_rejected_not_raised():
    candidate = Candidate()
    candidate.check = raises(KeyError("h"))
    assert judge(candidate).code is RejectCode.RAISED


@pytest.mark.parametrize("case", CASES["core"], ids=lambda c: c.name)
def test_the_adversarial_layout_is_the_same_problem(case):
    bad = adversarial(case)
    assert (bad.n, bad.tokens, max(bad.lengths)) == (case.n, case.tokens, max(case.lengths))
    assert GateTrial.of(bad).call.problem() == GateTrial.of(case).call.problem()


def test_the_adversarial_layout_is_skewed_and_has_a_sequence_without_slot():
    assert adversarial(BASE.but(lengths=(3, 3, 4, 3, 3), padded=())).lengths == (4, 0, 4, 4, 4)
    assert adversarial(CaseSpec("c", (1, 9, 2, 1))).lengths == (9, 0, 0, 4)
    assert adversarial(CaseSpec("c", (1, 9, 2, 1))).padded == (2,)


def test_a_large_problem_is_judged_on_a_subset_with_the_first_and_last_head():
    trial = GateTrial.of(CaseSpec("wide", (8,), h=4, hv=16, k=8, v=8))
    assert trial.heads(8 * 16, 0) == tuple(range(16))
    few = trial.heads(8 * 5, 0)
    assert len(few) == 5
    assert (few[0], few[-1]) == (0, 15)
    (first, drawn, last) = trial.heads(0, 0)
    assert (first, last) == (0, 15)
    assert 0 < drawn < 15
    assert trial.heads(8 * 5, 1) != few


def test_a_fault_in_the_last_head_is_found_within_any_budget():
    case = CaseSpec("wide", (8,), h=4, hv=16, k=8, v=8)
    assert judge(Candidate(after=lambda c: c.out[:, :, -1].mul_(1.1)), case, max_token_heads=0).code is RejectCode.WRONG


class TestKept:
    def test_calls_and_references_are_made_once_for_all_candidates(self):
        kept = Kept(1 << 30)
        assert judge(Candidate(), kept=kept)
        assert kept.made == 6  # two seeds and the adversarial layout: a call and a reference each
        assert judge(Candidate(), kept=kept)
        assert judge(Candidate(after=lambda c: c.out.mul_(1.1)), kept=kept).code is RejectCode.WRONG
        assert judge(Candidate(), kept=kept)
        assert (kept.made, kept.broken) == (6, 0)

    def test_what_does_not_fit_is_made_each_time(self):
        kept = Kept(0)
        assert judge(Candidate(), kept=kept)
        assert judge(Candidate(), kept=kept)
        assert kept.made == 12

    @pytest.mark.parametrize("what", ["images", "reference"])
    def test_who_writes_over_what_is_kept_harms_no_other_candidate(self, what):
        kept = Kept(1 << 30)
        assert judge(Candidate(), kept=kept)

        def scribble_on_kept(call):
            for sealed in kept._things.values():
                for t in sealed.thing.lasting() if isinstance(sealed.thing, GateTrial) is (what == "images") else ():
                    t.view(-1).view(torch.uint8)[:1] ^= 1

        judge(Candidate(after=scribble_on_kept), kept=kept)
        assert judge(Candidate(), kept=kept)
        assert kept.broken > 0

    def test_who_changes_the_record_of_the_call_harms_no_other_candidate(self):
        kept = Kept(1 << 30)

        def forget_the_pool(call):
            call.pool = call.write_slots = None

        assert judge(Candidate(after=forget_the_pool), kept=kept).code is RejectCode.INPUT_MODIFIED
        assert judge(Candidate(), kept=kept)
        assert judge(Candidate(after=lambda c: c.pool.mul_(1.1)), kept=kept).code in (
            RejectCode.WRONG,
            RejectCode.CANARY,
        )

    def test_who_changes_a_tensor_in_place_harms_no_other_candidate(self):
        kept = Kept(1 << 30)
        shrinks = judge(Candidate(after=lambda c: c.q.resize_(c.q.shape[0], 1)), kept=kept)
        assert shrinks.code is RejectCode.INPUT_MODIFIED
        assert judge(Candidate(), kept=kept)
        assert kept.broken == 1
