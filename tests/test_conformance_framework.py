"""The conformance framework, on a toy op: out = 2 * x."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from isokern import registry
from isokern.errors import RegistrationError, UnknownNameError
from isokern.registry.backend import Backend, Config
from isokern.registry.conformance.check import (
    BackendRaised,
    Declined,
    Needs,
    PredicateFault,
    Status,
    Tier,
    Violation,
    check,
)
from isokern.registry.conformance.exceptions import ExceptionEntry, Exceptions, load_exceptions
from isokern.registry.conformance.report import table
from isokern.registry.conformance.runner import run_checks
from isokern.registry.conformance.subject import Subject
from isokern.registry.decision import Accepted, RejectCode, Rejected


@dataclasses.dataclass(frozen=True)
class ToyProblem:
    size: int


@dataclasses.dataclass
class ToyCall:
    x: torch.Tensor
    out: torch.Tensor | None

    def problem(self):
        return ToyProblem(self.x.numel())


def call(size=4):
    return ToyCall(torch.ones(size), torch.empty(size))


class Toy(Backend):
    """Doubles x; the tests replace its parts."""

    op = "fused_sigmoid_gating"  # only its name is used: for the default path of the exceptions file
    name = "toy"
    provenance = "torch"

    def __init__(self, run=None, verdict=None, configs=None, tags=frozenset()):
        self._run = run or (lambda call: call.out.copy_(2 * call.x))
        self._verdict = verdict or (lambda problem: Accepted())
        self._configs = configs or (lambda problem: (Config(),))
        self.tags = tags
        self.binds = 0

    def check(self, problem):
        return self._verdict(problem)

    def configs(self, problem):
        return self._configs(problem)

    def bind(self, problem, config):
        self.binds += 1
        return self._run


@check("T1", "doubles", relaxable=True)
def doubles(subject):
    for size in (3, 4):

        def examine(size=size):
            got = subject.run(call(size))
            if not torch.equal(got, torch.full((size,), 2.0)):
                raise Violation(f"got {got.tolist()}", ratio=7.5)
            return 0.5

        yield f"size {size}", examine


@check("T2", "equal or close", relaxable=True, promise="repeatable")
def relation(subject):
    def examine():
        limit = subject.relax("T2")
        if limit is None:
            raise Violation("bits differ")
        return limit

    yield "relation", examine


@check("T3", "slow", tier=Tier.FULL)
def slow(subject):
    yield "slow", lambda: None


@check("T4", "on a GPU", needs=Needs.GPU)
def on_gpu(subject):
    yield "gpu", lambda: None


@check("T5", "in an engine", needs=Needs.ENGINE)
def in_engine(subject):
    yield "engine", lambda: None


TOY = dataclasses.replace(
    registry.spec("fused_sigmoid_gating"), name="toy_op", checks=lambda: (doubles, relation, slow, on_gpu, in_engine)
)


def run(backend, only=("T1",), **options):
    return run_checks(TOY, backend, only=only, peers=(), **options)


def excused(check_id, limit):
    return Exceptions({check_id: ExceptionEntry(check_id, limit, "said so in a test")}, "test.toml")


# ---- findings


def test_a_correct_backend_passes_every_case_with_its_ratio():
    report = run(Toy())
    assert report.ok
    assert [(f.check, f.case, f.status, f.ratio) for f in report.findings] == [
        ("T1", "size 3", Status.PASS, 0.5),
        ("T1", "size 4", Status.PASS, 0.5),
    ]


def test_a_wrong_result_is_a_failure_with_its_ratio():
    report = run(Toy(run=lambda c: c.out.copy_(3 * c.x)))
    assert not report.ok
    assert [f.ratio for f in report.failures] == [7.5, 7.5]
    assert "3.0" in report.failures[0].message


def test_a_decline_is_a_finding_with_the_predicate_s_reason():
    verdict = lambda p: Rejected(RejectCode.SHAPE, "three is too few") if p.size == 3 else Accepted()  # noqa: E731
    report = run(Toy(verdict=verdict))
    assert report.ok
    assert report.findings[0].status is Status.DECLINED
    assert report.findings[0].message == "[shape] three is too few"


@pytest.mark.parametrize("stage", ["bind", "run"])
def test_a_backend_that_raises_fails_the_case_and_the_suite_goes_on(stage):
    def explode(*_):
        raise OSError("out of order")

    backend = Toy(run=explode)
    if stage == "bind":
        backend.bind = explode
    report = run(backend)
    assert [f.status for f in report.findings] == [Status.FAIL, Status.FAIL]
    assert report.findings[0].message == f"{stage} raised OSError: out of order"


def test_the_suite_s_own_mistakes_are_not_hidden():
    @check("T9", "broken check")
    def broken(subject):
        yield "case", lambda: 1 / 0

    with pytest.raises(ZeroDivisionError):
        list(broken.run(Subject(Toy())))


def test_a_predicate_that_changes_its_mind_is_an_error():
    answers = iter([Accepted(), Rejected(RejectCode.POLICY, "not now")] * 9)
    (finding, *_) = run(Toy(verdict=lambda p: next(answers))).findings
    assert finding.status is Status.ERROR
    assert "two ways" in finding.message


@pytest.mark.parametrize("verdict", [lambda p: True, lambda p: None, lambda p: p.no_such_field])
def test_a_predicate_that_gives_no_verdict_is_an_error(verdict):
    (finding, *_) = run(Toy(verdict=verdict)).findings
    assert finding.status is Status.ERROR
    assert finding.message.startswith("check() ")


# ---- subject


def test_outputs_are_poisoned_before_every_run():
    seen = []

    def look(c):
        seen.append(c.out.clone())
        return c.out.copy_(2 * c.x)

    subject = Subject(Toy(run=look))
    subject.run(call())
    subject.run(call(), poison=5.0)
    assert torch.isnan(seen[0]).all()
    assert (seen[1] == 5).all()


def test_binds_once_per_problem_and_config_and_counts_launches():
    backend = Toy()
    subject = Subject(backend)
    for size in (4, 4, 5):
        subject.run(call(size))
    assert (backend.binds, subject.launches) == (2, 3)


def test_the_default_config_is_the_first_one_offered():
    fast, slow = Config.of(chunk=16), Config.of(chunk=64)
    backend = Toy(configs=lambda p: (fast, slow))
    assert Subject(backend).config_for(ToyProblem(4)) == fast
    assert Subject(backend, slow).config_for(ToyProblem(4)) == slow
    with pytest.raises(Declined, match="not offered"):
        Subject(backend, Config.of(chunk=32)).config_for(ToyProblem(4))


def test_no_config_at_all_is_a_fault():
    with pytest.raises(PredicateFault, match="empty"):
        Subject(Toy(configs=lambda p: ())).config_for(ToyProblem(4))


def test_the_error_bound_s_chunk_is_the_config_s():
    backend = Toy(configs=lambda p: (Config.of(chunk=16),))
    assert Subject(backend).chunk(call()) is None
    backend.accuracy = "chunked"
    assert Subject(backend).chunk(call()) == 16


def test_a_chunked_backend_without_a_chunk_is_a_fault():
    backend = Toy()
    backend.accuracy = "chunked"
    with pytest.raises(PredicateFault, match="chunk"):
        Subject(backend).chunk(call())


@pytest.mark.parametrize(
    "returned",
    [
        lambda c: None,
        lambda c: 2 * c.x,
        lambda c: c.out[:2],
        lambda c: torch.nn.Parameter(c.out),
    ],
    ids=["nothing", "another tensor", "a part", "a subclass"],
)
def test_what_is_returned_must_be_the_output_given(returned):
    with pytest.raises(Violation):
        Subject(Toy(run=returned)).run(call())


def test_what_was_raised_is_kept_as_the_cause():
    def explode(_):
        raise MemoryError

    with pytest.raises(BackendRaised) as caught:
        Subject(Toy(run=explode)).run(call())
    assert isinstance(caught.value.__cause__, MemoryError)


# ---- which checks run


def test_slow_and_impossible_checks_are_reported_as_skipped():
    report = run(Toy(), only=None, exceptions=excused("T2", 2.0))
    assert {s.check: s.why for s in report.skipped} == {
        "T3": "only in tier full",
        "T4": "needs gpu",
        "T5": "needs engine",
    }
    assert "T3" not in {s.check for s in run(Toy(), only=None, tier="full").skipped}


def test_an_unknown_check_is_named_with_near_matches():
    with pytest.raises(UnknownNameError, match="'T1'"):
        run(Toy(), only=["T11"])


def test_fail_fast_stops_at_the_first_failure():
    wrong = Toy(run=lambda c: c.out.zero_())
    assert len(run(wrong, fail_fast=True).findings) == 1


def test_progress_sees_every_finding():
    seen = []
    report = run(Toy(), on_progress=seen.append)
    assert tuple(seen) == report.findings


def test_a_run_that_ran_nothing_is_no_success():
    never = Toy(verdict=lambda p: Rejected(RejectCode.FEATURE, "no"))
    report = run(never)
    assert not report.ok
    assert report.undeclared == ("T1",)
    assert "nothing ran" in report.describe_failures()
    assert not run(Toy(), only=["T3"]).ok


def test_a_check_that_a_specialised_backend_declines_is_listed_not_failed():
    @check("T7", "other sizes")
    def other(subject):
        yield "size 9", lambda: subject.run(call(9)) and None

    spec = dataclasses.replace(TOY, checks=lambda: (doubles, other))
    small = Toy(verdict=lambda p: Accepted() if p.size < 9 else Rejected(RejectCode.SHAPE, "at most 8"))
    report = run_checks(spec, small, peers=())
    assert report.ok
    assert report.undeclared == ("T7",)


# ---- exceptions


def test_a_relation_is_bitwise_unless_excused():
    assert not run(Toy(), only=["T2"]).ok
    report = run(Toy(), only=["T2"], exceptions=excused("T2", 1.5))
    assert report.ok
    assert report.findings[0].ratio == 1.5
    assert report.excused == {"T2": "said so in a test"}


def test_a_tag_s_promise_cannot_be_excused():
    report = run(Toy(tags=frozenset({"repeatable"})), only=["T2"], exceptions=excused("T2", 2.0))
    assert not report.ok
    assert "promises" in report.failures[0].message


def test_a_check_of_values_or_memory_cannot_be_relaxed():
    report = run(Toy(), only=["T3"], tier="full", exceptions=excused("T3", 2.0))
    assert "cannot be relaxed" in report.failures[0].message


def test_a_declared_decline_stands_but_must_be_needed():
    never = Toy(verdict=lambda p: Rejected(RejectCode.FEATURE, "no"))
    report = run(never, exceptions=excused("T1", None))
    assert (report.failures, report.undeclared) == ((), ())
    unused = run(Toy(), exceptions=excused("T1", None))
    assert "unused exception" in unused.failures[0].message


def test_an_exception_that_nothing_needs_is_an_error():
    report = run(Toy(), exceptions=excused("T1", 2.0))
    assert [f.status for f in report.failures] == [Status.ERROR]
    assert "unused exception" in report.failures[0].message


def test_an_exception_that_depends_on_the_machine_may_go_unused():
    varies = Exceptions({"T1": ExceptionEntry("T1", 2.0, "said so in a test", varies=True)}, "test.toml")
    assert run(Toy(), exceptions=varies).ok


def test_an_exception_for_an_unknown_check_is_an_error():
    report = run(Toy(), exceptions=excused("T77", 2.0))
    assert "unknown check" in report.failures[0].message


GOOD = '[[exception]]\ncheck = "M2"\nrelation = "bound"\nlimit = 2.0\nreason = "sums in another order"\n'


def exceptions_of(tmp_path: Path, text: str) -> Exceptions:
    backend = Toy()
    backend.exceptions_file = str(tmp_path / "toy.toml")
    Path(backend.exceptions_file).write_text(text)
    return load_exceptions("fused_sigmoid_gating", backend)


def test_a_third_party_backend_names_its_own_exceptions_file(tmp_path):
    found = exceptions_of(tmp_path, GOOD + '[[exception]]\ncheck="C2"\nrelation="declined"\nreason="no token trees"\n')
    assert found.entries["M2"].limit == 2.0
    assert found.declines("C2")
    assert found.source.endswith("toy.toml")


def test_a_backend_without_a_file_has_no_exceptions():
    assert not load_exceptions("fused_sigmoid_gating", Toy()).entries
    assert not load_exceptions("an_op_from_elsewhere", Toy()).entries


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[exception", "not valid TOML"),
        ("[other]\n", "only"),
        (GOOD.replace("M2", ""), "check"),
        (GOOD.replace("sums in another order", ""), "reason"),
        (GOOD.replace("sums in another order", "flaky"), "reason"),
        (GOOD.replace("2.0", "2.5"), "limit"),
        (GOOD.replace("2.0", "0"), "limit"),
        (GOOD.replace("2.0", "true"), "limit"),
        (GOOD.replace('"bound"', '"skip"'), "relation"),
        (GOOD.replace('"bound"', '"declined"'), "relation"),
        (GOOD + 'varies = "sometimes"\n', "varies"),
        (GOOD + "severity = 3\n", "severity"),
        (GOOD + GOOD, "two exceptions"),
    ],
)
def test_a_malformed_exceptions_file_is_refused_by_name(tmp_path, text, complaint):
    with pytest.raises(RegistrationError, match=complaint) as caught:
        exceptions_of(tmp_path, text)
    assert "toy.toml" in str(caught.value)


def test_a_named_file_that_is_missing_is_refused(tmp_path):
    backend = Toy()
    backend.exceptions_file = str(tmp_path / "gone.toml")
    with pytest.raises(RegistrationError, match="does not exist"):
        load_exceptions("fused_sigmoid_gating", backend)


# ---- report


def test_the_report_is_json_even_with_infinite_ratios():
    @check("T6", "infinitely wrong")
    def infinite(subject):
        def examine():
            raise Violation("far off", math.inf)

        yield "case", examine

    spec = dataclasses.replace(TOY, checks=lambda: (infinite,))
    data = json.loads(run_checks(spec, Toy(), peers=()).to_json())
    assert data["ok"] is False
    assert data["findings"][0]["ratio"] == "inf"
    assert data["findings"][0]["status"] == "fail"


def test_the_table_shows_every_backend_beside_every_check():
    from rich.console import Console

    wrong = Toy(run=lambda c: c.out.zero_())
    wrong.name = "wrong"
    declining = Toy(verdict=lambda p: Rejected(RejectCode.SHAPE, "no") if p.size == 3 else Accepted())
    declining.name = "choosy"
    reports = [run(Toy()), run(wrong), run(declining, only=["T1", "T3"])]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(reports))
    text = console.export_text()
    for words in ("toy", "wrong", "choosy", "pass 2 (0.5)", "FAIL 2 of 2 (7.5)", "pass 1, declined 1", "not run"):
        assert words in text


def test_failures_are_described_line_by_line():
    report = run(Toy(run=lambda c: c.out.zero_()))
    assert report.describe_failures(most=1).splitlines() == [
        "T1 [size 3] fail: got [0.0, 0.0, 0.0]",
        "... and 1 more",
    ]
