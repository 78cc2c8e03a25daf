"""``isokern verify --jobs``: processes that examine, what they find told as it comes, and the same report."""

from __future__ import annotations

import io
import json
import re
import threading
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from isokern import registry
from isokern.cli import import_backends
from isokern.errors import IsokernError
from isokern.registry import FunctionBackend
from isokern.registry.conformance import cli, parallel
from isokern.registry.conformance.check import Finding, Status
from isokern.registry.conformance.cli import verify_backends
from isokern.registry.conformance.process import DeviceProcess
from isokern.registry.conformance.report import EXCEPTIONS, Report, Skipped
from isokern.registry.conformance.runner import run_checks
from isokern.registry.conformance.telling import Lines, Moving, telling_on

OP = "fused_sigmoid_gating"

TOYS = """
import os
from isokern import registry
from isokern.backends.torch_native.reference import run_reference
from isokern.registry import FunctionBackend

def dies(call):
    if call.is_kda and call.tokens:
        os._exit(7)
    return run_reference(call)

registry.register_backend(FunctionBackend(run_reference, "fused_sigmoid_gating", "right"))
registry.register_backend(FunctionBackend(dies, "fused_sigmoid_gating", "dies"))
"""


def verify(names, checks, device="cpu", **options):
    out = io.StringIO()
    ok = verify_backends(
        OP,
        names,
        checks,
        full=False,
        every_config=False,
        out=Console(file=out, width=300, color_system=None),
        device=device,
        **{"report": None, **options},
    )
    return ok, out.getvalue()


def table_of(text):
    return text[text.index("conformance of") :]


def without_seconds(path):
    reports = [Report.from_dict(r) for r in json.loads(path.read_text())]
    return [replace(r, findings=tuple(replace(f, seconds=0.0) for f in r.findings)) for r in reports]


@pytest.fixture
def toys(tmp_path):
    path = tmp_path / "toys.py"
    path.write_text(TOYS)
    import_backends([str(path)])
    yield str(path)
    for name in ("right", "dies"):
        registry.unregister_backend(OP, name)


def test_processes_report_what_one_would_and_a_death_is_a_finding_against_its_check(toys, tmp_path):
    checks = ["M9", "S7", "S4E"]
    alone, text = verify(["right"], checks, report=tmp_path / "one.json")
    assert alone
    ok, told = verify(["right", "dies"], checks, jobs=2, imports=[toys], report=tmp_path / "two.json")
    assert not ok
    right, dies = without_seconds(tmp_path / "two.json")
    assert [right] == without_seconds(tmp_path / "one.json")
    assert {check: s.status for check, s in dies.summaries().items()} == {"M9": Status.ERROR, "S7": Status.PASS}
    assert re.search("the process died.*exited with status 7", dies.failures[0].message)
    assert dies.failures[0].case == "float32", "the last case that came back"
    assert dies.titles == right.titles
    assert [line for line in table_of(text).splitlines() if "right: S4E" in line] == [
        "right: S4E was not tried: needs engine"
    ]
    assert "right: S4E was not tried: needs engine" in table_of(told)


class Fake(DeviceProcess):
    """Stands for a process: reports of its own, and what it was asked."""

    made: ClassVar[list[Fake]] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []
        self.closed = 0
        type(self).made.append(self)

    def close(self):
        self.closed += 1

    def elsewhere(self, op, backend, device):
        self.asked.append(("elsewhere", backend.name, device))

    def run_checks(self, op, backend, only, tier, config, device, on_progress=None):
        [check] = only
        self.asked.append((backend, check))
        findings = self.findings(backend, check)
        skipped = () if findings else (Skipped(check, "needs engine"),)
        return Report(OP, backend, "default", findings, skipped, {check: "t"}, {}, "a GPU")

    def findings(self, backend, check):
        return () if check.startswith("S4") else (Finding(check, "case", Status.PASS, ratio=0.5),)


class FakeEngine:
    made: ClassVar[list[FakeEngine]] = []

    def __init__(self, backend):
        self.backend = backend
        self.asked = []
        type(self).made.append(self)

    def run_checks(self, only, tier, config, on_progress):
        self.asked += only
        finding = Finding(only[0], "case", Status.PASS)
        return Report(OP, self.backend, "default", (finding,), (), {only[0]: "t"}, {}, "an engine")

    def close(self):
        pass

    kill = close


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(cli, "DeviceProcess", Fake)
    monkeypatch.setattr(parallel, "EngineSession", FakeEngine)
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_this_process_uses_no_gpu(fakes, monkeypatch):
    monkeypatch.setattr(cli, "run_checks", lambda *args, **kwargs: pytest.fail("here"))
    monkeypatch.setattr(cli, "belongs_elsewhere", lambda *args: pytest.fail("here"))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a context"))
    monkeypatch.setattr("isokern.registry.conformance.places.missing_modules", lambda backend: ())
    ok, _ = verify(["cupy"], ["N1", "M1"], device="auto", jobs=2)
    assert ok
    assert Fake.made[0].asked[0] == ("elsewhere", "cupy", "cuda")


def test_what_a_gpu_cannot_check_goes_to_an_engine_and_rows_keep_their_order(fakes, monkeypatch, tmp_path):
    monkeypatch.setattr("isokern.registry.conformance.places.missing_modules", lambda backend: ())
    ok, text = verify(["cupy", "triton"], ["X1", "S4E", "N1", "N4L"], device="auto", jobs=3, report=tmp_path / "r.json")
    assert ok
    reports = without_seconds(tmp_path / "r.json")
    assert [r.backend for r in reports] == ["cupy", "triton"]
    for report in reports:
        assert [f.check for f in report.findings] == ["N1", "X1", "N4L", "S4E"]  # the engine's last, as in one process
        assert list(report.titles) == ["N1", "N4L", "S4E", "X1"]
        assert report.place == "a GPU, an engine"
        assert not report.skipped
    assert {name for engine in FakeEngine.made for name in engine.asked} == {"N4L", "S4E"}, (
        "who says that a check is slow does not matter, but one does"
    )
    assert {asked[1] for process in Fake.made for asked in process.asked} == {"cupy", "triton", "N1", "X1"}
    assert "not tried" not in text


def test_a_gpu_that_has_nothing_to_check_is_named_all_the_same(fakes, monkeypatch, tmp_path):
    monkeypatch.setattr("isokern.registry.conformance.places.missing_modules", lambda backend: ())
    verify(["cupy"], ["S4", "S4E"], device="auto", jobs=3, report=tmp_path / "r.json")
    [report] = without_seconds(tmp_path / "r.json")
    assert [f.check for f in report.findings] == ["S4", "S4E"]
    assert report.place == "a GPU, an engine"
    assert not report.skipped


def test_where_every_process_died_the_device_is_named(fakes, monkeypatch, tmp_path):
    monkeypatch.setattr("isokern.registry.conformance.places.missing_modules", lambda backend: ())
    finding = Finding("N1", "start", Status.ERROR, "died")
    died = Report(OP, "cupy", "default", (finding,), (), {"N1": ""}, {}, "")
    monkeypatch.setattr(Fake, "run_checks", lambda *args: died)
    verify(["cupy"], ["N1"], device="cuda", jobs=2, report=tmp_path / "r.json")
    [report] = without_seconds(tmp_path / "r.json")
    assert report.place == "cuda"


def test_a_process_whose_gpu_kernel_failed_is_replaced(fakes, monkeypatch):
    monkeypatch.setattr("isokern.registry.conformance.places.missing_modules", lambda backend: ())

    def findings(self, backend, check):
        return (Finding(check, "case", Status.FAIL if check == "M1" else Status.PASS),)

    monkeypatch.setattr(Fake, "findings", findings)
    closed = []
    monkeypatch.setattr(Fake, "close", lambda self: closed.append(self.asked[-1]))
    verify(["cupy"], ["N1", "M1", "X1"], device="cuda", jobs=2)
    assert ("cupy", "M1") in closed


def test_an_error_ends_all_and_is_the_one_raised(fakes, monkeypatch):
    monkeypatch.setattr("isokern.registry.conformance.places.missing_modules", lambda backend: ())
    other_runs, ended = threading.Event(), threading.Event()
    waited = []

    def findings(self, backend, check):
        if check == "X1":
            assert other_runs.wait(10)
            raise IsokernError("no such thing there")
        other_runs.set()
        waited.append(ended.wait(10))
        raise IsokernError("ended")

    monkeypatch.setattr(Fake, "findings", findings)
    monkeypatch.setattr(Fake, "kill", lambda self: ended.set())
    with pytest.raises(IsokernError, match="no such thing there"):
        verify(["cupy"], ["N1", "X1"], device="cuda", jobs=2)
    assert waited == [True]


@pytest.mark.parametrize(("cores", "checks", "jobs"), [(16, 1, 1), (16, 7, 1), (16, 8, 2), (16, 500, 16), (1, 500, 1)])
def test_a_process_needs_a_few_checks_to_be_worth_it(monkeypatch, cores, checks, jobs):
    monkeypatch.setattr(parallel, "processors", lambda: cores)
    assert parallel.sensible_jobs(checks) == jobs


def test_what_is_wrong_with_an_exceptions_file_is_reported_once():
    def part(check):
        findings = (Finding("N1", EXCEPTIONS, Status.ERROR, "cannot be relaxed"), Finding(check, "a", Status.PASS))
        return Report(OP, "b", "default", findings, (), {check: "t"}, {"M2": "why"}, "cpu")

    joined = Report.of_parts([part("N1"), part("M2")])
    assert [(f.check, f.case) for f in joined.findings] == [("N1", EXCEPTIONS), ("N1", "a"), ("M2", "a")]
    assert joined.excused == {"M2": "why"}


class TestTelling:
    def test_a_run_that_is_cut_off_has_shown_what_it_found(self):
        def stops(call):
            if call.is_kda:
                raise KeyboardInterrupt
            return call.out.zero_()

        registry.register_backend(FunctionBackend(stops, OP, "stops"))
        out = io.StringIO()
        console = Console(file=out, width=300, color_system=None)
        try:
            with pytest.raises(KeyboardInterrupt):
                verify_backends(OP, ["stops"], ["N3", "M9"], full=False, every_config=False, report=None, out=console)
        finally:
            registry.unregister_backend(OP, "stops")
        assert "stops: N3: FAIL 2 of 2" in out.getvalue()
        assert "[bfloat16, 80 tokens] fail: " in out.getvalue()
        assert "conformance of" not in out.getvalue()

    def test_a_check_is_a_line_when_it_has_ended(self):
        _, text = verify(["torch_reference"], ["S7", "M9"])
        told = text[: text.index("conformance of")].splitlines()
        assert [line.split(",")[0] for line in told if line.strip()] == [
            "torch_reference: M9: pass 5 (0.97)",
            "torch_reference: S7: pass 7",
        ]

    def test_of_many_failures_the_first_are_quoted(self):
        out = io.StringIO()
        bad = [Finding("N1", f"case {i}", Status.FAIL, "wrong") for i in range(5)]
        Lines(Console(file=out, width=80)).ended("x", bad)
        assert out.getvalue().splitlines()[1:] == [
            "    [case 0] fail: wrong",
            "    [case 1] fail: wrong",
            "    [case 2] fail: wrong",
            "    ... and 2 more",
        ]

    def test_a_terminal_sees_where_it_is(self):
        out = io.StringIO()
        within, telling = telling_on(Console(file=out, force_terminal=True, width=80))
        assert isinstance(telling, Moving)
        with within:
            telling.found("cupy", Finding("N1", "case", Status.PASS))
            telling.found("cupy", Finding("N2", "case", Status.PASS))
            within.refresh()
            assert "cupy N2" in out.getvalue()
            telling.finished("cupy")
            assert not within.tasks

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_who_has_finished_is_said_once(self, jobs, monkeypatch, fakes):
        finished = []
        monkeypatch.setattr(Lines, "finished", lambda self, subject: finished.append(subject))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(Fake, "findings", lambda self, backend, check: (Finding(check, "a", Status.PASS),))
        verify(["torch_reference", "torch_vectorized"], ["S7", "M9"], jobs=jobs)
        assert sorted(finished) == ["torch_reference", "torch_vectorized"]


def test_an_unknown_backend_there_is_an_error_and_not_a_hang(monkeypatch):
    backend = FunctionBackend(lambda call: call.out, OP, "only_here")
    report = run_checks(OP, backend, only=["S4E"])
    assert [s.check for s in report.skipped] == ["S4E"]
    with DeviceProcess(1) as process, pytest.raises(IsokernError, match="unknown backend 'only_here'"):
        process.elsewhere(OP, backend, "cpu")
