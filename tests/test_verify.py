"""``isokern verify``: what runs where, one table either way, and errors instead of silence."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from isokern import engines, registry
from isokern.engines import ENGINES, MissingEngineError
from isokern.errors import ArgumentValueError, IsokernError, UnknownNameError
from isokern.registry import Accepted, FunctionBackend, RejectCode, Rejected
from isokern.registry.conformance import cli, places
from isokern.registry.conformance.check import Finding, Status
from isokern.registry.conformance.cli import verify_backends
from isokern.registry.conformance.report import Report, Skipped
from isokern.registry.conformance.runner import belongs_elsewhere

OP = "fused_sigmoid_gating"
GPU = tuple(ENGINES)
#: Without the adapters to other libraries, which are not installed.
OWN = {name for name, backend in registry.backends(OP).items() if backend.provenance != "external"}


class Ran:
    """Stands for the suite: notes what was to run where."""

    def __init__(self, monkeypatch, cuda=False, not_on_gpu=()):
        self.calls = []
        self.not_on_gpu = not_on_gpu
        self.in_engines = {}
        monkeypatch.setattr(cli, "run_checks", self.on_device)
        monkeypatch.setattr(cli, "EngineSession", self.session)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        if cuda:  # no tensor can be made there: say what the predicates would
            monkeypatch.setattr(cli, "belongs_elsewhere", self.elsewhere)

    @staticmethod
    def elsewhere(op, backend, device):
        runs = ("cuda",) if backend.name in GPU else ("cpu",) if backend.name == "numba_cpu" else ("cpu", "cuda")
        return None if device in runs else "of another device"

    def on_device(self, op, backend, config, checks, tier, advance, *, device):
        self.calls.append((backend.name, str(device), config))
        skipped = self.not_on_gpu if device == "cuda" else ()
        return report_of(backend.name, device, skipped=skipped)

    def session(self, backend):
        ran = self

        class Session:
            def __enter__(self):
                return self

            def __exit__(self, *exc):
                pass

            def run_checks(self, checks, tier, config, advance):
                if checks is None:
                    ran.calls.append((backend, "engine", config))
                    return report_of(backend, "engine")
                ran.in_engines[backend] = checks
                return report_of(backend, "engine", *checks)

        return Session()

    @property
    def places(self):
        return {name: place for name, place, _ in self.calls}


def report_of(backend, place, *checks, skipped=()):
    findings = tuple(Finding(check, "case", Status.PASS, ratio=0.5) for check in checks or ("N1",))
    titles = dict.fromkeys((*(checks or ("N1",)), *skipped), "holds")
    left = tuple(Skipped(check, "needs an engine") for check in skipped)
    return Report(OP, backend, "default", findings, left, titles, {}, str(place))


def verify(names=None, checks=None, device="auto", every_config=False, report=None):
    out = io.StringIO()
    ok = verify_backends(
        OP,
        names,
        checks,
        full=False,
        every_config=every_config,
        report=report,
        out=Console(file=out, width=300, color_system=None),
        device=device,
    )
    return ok, out.getvalue()


class TestPlaces:
    def test_without_a_gpu_gpu_backends_run_in_their_engines(self, monkeypatch):
        ran = Ran(monkeypatch)
        ok, text = verify()
        assert ok
        assert ran.places == {
            **dict.fromkeys(("torch_reference", "torch_vectorized", "torch_chunked", "numba_cpu", "composite"), "cpu"),
            **dict.fromkeys(GPU, "engine"),
        }
        for name in ran.places:
            assert name in text

    def test_with_a_gpu_everything_that_can_runs_there(self, monkeypatch):
        ran = Ran(monkeypatch, cuda=True)
        verify()
        assert ran.places == {name: "cpu" if name == "numba_cpu" else "cuda" for name in OWN}

    def test_what_no_gpu_can_check_is_checked_in_the_engine_beside_it(self, monkeypatch):
        ran = Ran(monkeypatch, cuda=True, not_on_gpu=("S4", "S5"))
        ok, text = verify(["cupy"])
        assert ok
        assert ran.places == {"cupy": "cuda"}
        assert ran.in_engines == {"cupy": ["S4", "S5"]}
        assert "cuda, engine" in text
        assert "not run" not in text
        assert "was not tried" not in text

    def test_a_gpu_alone_can_be_asked_for_and_says_what_it_did_not_check(self, monkeypatch):
        ran = Ran(monkeypatch, cuda=True, not_on_gpu=("S4",))
        ok, text = verify(["cupy"], device="cuda")
        assert ok
        assert not ran.in_engines
        assert "cupy: S4 was not tried: needs an engine" in text

    def test_the_cpu_can_be_asked_for_where_there_is_a_gpu(self, monkeypatch):
        ran = Ran(monkeypatch, cuda=True)
        verify(["cupy", "torch_chunked"], device="cpu")
        assert ran.places == {"cupy": "engine", "torch_chunked": "cpu"}

    def test_the_gpu_can_be_asked_for(self, monkeypatch):
        ran = Ran(monkeypatch, cuda=True)
        ok, text = verify(device="cuda")
        assert ok
        assert set(ran.places) == OWN - {"numba_cpu"}
        assert "numba_cpu: not verified: --device: expected one that 'numba_cpu' runs on" in text

    def test_a_gpu_that_is_not_there_is_an_error(self, monkeypatch):
        Ran(monkeypatch)
        with pytest.raises(ArgumentValueError, match="none found"):
            verify(["cupy"], device="cuda")

    def test_a_named_backend_that_does_not_run_there_is_an_error(self, monkeypatch):
        Ran(monkeypatch, cuda=True)
        with pytest.raises(ArgumentValueError, match="'numba_cpu' runs on, given cuda"):
            verify(["numba_cpu"], device="cuda")

    def test_devices_have_names(self):
        with pytest.raises(ArgumentValueError, match="auto or cpu or cuda"):
            verify(device="gpu")

    @pytest.mark.parametrize(("backend", "elsewhere"), [("cupy", True), ("numba_cpu", False), ("torch_chunked", False)])
    def test_the_predicate_says_where_a_backend_belongs(self, backend, elsewhere):
        reason = belongs_elsewhere(OP, registry.backends(OP)[backend], "cpu")
        assert (reason is not None) is elsewhere

    def test_a_gpu_backend_without_an_engine_is_told_and_not_passed(self, monkeypatch):
        Ran(monkeypatch)

        def check(problem):
            return Accepted() if problem.device == "cuda" else Rejected(RejectCode.DEVICE, "wants a GPU")

        registry.register_backend(FunctionBackend(print, OP, "my_gpu", check=check))
        try:
            ok, text = verify()
            assert ok
            assert "my_gpu: not verified" in text
            with pytest.raises(ArgumentValueError, match="wants a GPU"):
                verify(["my_gpu"])
        finally:
            registry.unregister_backend(OP, "my_gpu")

    def test_every_config_of_an_engine_is_one_of_the_gpus(self, monkeypatch):
        ran = Ran(monkeypatch)
        verify(["triton"], every_config=True)
        configs = [config for _, _, config in ran.calls]
        assert len(set(configs)) == len(configs) > 1


class TestWhatIsMissing:
    def test_unknown_names(self):
        with pytest.raises(UnknownNameError, match="did you mean 'cupy'"):
            verify(["cupi"])
        with pytest.raises(UnknownNameError, match="Known: C1"):
            verify(["cupy"], ["N77"])

    def test_an_installed_backend_whose_engine_is_not_there_is_an_error_even_if_not_named(self, monkeypatch):
        ran = Ran(monkeypatch)
        monkeypatch.setattr(engines.shutil, "which", lambda program: None)
        with pytest.raises(MissingEngineError, match=r"needs g\+\+"):
            verify()
        assert not ran.calls

    def test_a_framework_that_is_missing_is_named_with_how_to_install_it(self, monkeypatch):
        Ran(monkeypatch, cuda=True)
        monkeypatch.setattr(places, "missing_modules", lambda b: b.requires if b.name in GPU else ())
        ok, text = verify()
        assert ok, "the others are there"
        assert "cupy: not verified: backend 'cupy' needs cupy: pip install 'isokern[cupy-cuda13x]'" in text
        with pytest.raises(IsokernError, match=r"pip install 'isokern\[triton\]'"):
            verify(["triton"])

    def test_a_missing_compiler_is_one_line_and_status_2(self, tmp_path):
        (tmp_path / "python").symlink_to(sys.executable)
        done = subprocess.run(
            [sys.executable, "-m", "isokern", "verify", "--backend", "cupy", "--check", "N3", "--device", "cpu"],
            env={**os.environ, "PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert "needs g++" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_table_and_the_report_say_what_it_ran_on(tmp_path, monkeypatch):
    assert shutil.which("g++"), "the engine of the CUDA C++ backend compiles with g++"
    ok, text = verify(["cupy", "torch_reference"], ["N3", "S5"], device="cpu", report=tmp_path / "report.json")
    assert ok
    table = text[text.index("conformance of") :]
    header = [line for line in table.splitlines() if "cupy" in line or "cuda_on_cpu" in line]
    assert "torch_reference" in header[0]
    assert "cuda_on_cpu" in header[1]
    assert "cpu" in header[1].split("cuda_on_cpu")[1]
    assert "cupy: S5 was not tried: needs cpu" in text
    reports = [Report.from_dict(r) for r in json.loads((tmp_path / "report.json").read_text())]
    assert [(r.backend, r.place) for r in reports] == [("cupy", "cuda_on_cpu"), ("torch_reference", "cpu")]
    assert all(r.ok for r in reports)
    assert reports[0].titles == reports[1].titles


def test_a_report_survives_json():
    findings = (
        Finding("N1", "a", Status.FAIL, "wrong", float("inf"), 0.5),
        Finding("N1", "b", Status.DECLINED, "no", None, 0.1),
    )
    report = Report(OP, "x", "default", findings, (), {"N1": "holds"}, {"M1": "why"}, "somewhere")
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_findings_that_could_not_be_kept_are_not_looked_for(monkeypatch, tmp_path):
    ran, nowhere, out = Ran(monkeypatch), tmp_path / "none" / "x.json", Console(file=io.StringIO())
    with pytest.raises(ArgumentValueError, match=r"--report: expected a file that can be written, given .*none"):
        verify_backends(OP, ["torch_reference"], ["N1"], full=False, every_config=False, report=nowhere, out=out)
    assert ran.calls == []


def test_a_module_that_cannot_be_imported_is_named():
    from isokern.cli import import_backends

    with pytest.raises(ArgumentValueError, match="--import: expected a module that can be imported, given nomodule: "):
        import_backends(["nomodule"])
