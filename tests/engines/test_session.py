"""EngineSession: an engine in a process of its own, serving request after request; one that dies, or is not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isokern import engines
from isokern.engines import MissingEngineError
from isokern.engines.session import EngineSession
from isokern.errors import IsokernError
from isokern.registry.conformance.check import Status

pytestmark = pytest.mark.engine("cuda_on_cpu")


@pytest.fixture
def session():
    with EngineSession("cupy") as opened:
        yield opened


def test_one_process_serves_all_requests(session):
    seen = []
    first = session.run_checks(["S7"], on_progress=seen.append)
    process = session._process.pid
    second = session.run_checks(["S7", "M9"])
    assert session._process.pid == process
    assert first.ok
    assert second.ok
    assert tuple(seen) == first.findings
    assert (first.backend, first.place) == ("cupy", "cuda_on_cpu")
    assert list(second.titles) == ["M9", "S7"]


def test_a_request_that_cannot_be_met_is_an_error_and_the_next_is_served(session):
    with pytest.raises(IsokernError, match="unknown check 'N77'"):
        session.run_checks(["N77"])
    assert session.run_checks(["S7"]).ok


def test_an_engine_that_dies_is_a_finding_against_the_backend_and_is_replaced(session):
    def kill(finding):
        os.kill(session._process.pid, signal.SIGKILL)

    report = session.run_checks(["M9", "N1"], on_progress=kill)
    assert not report.ok
    assert report.findings[-1].status is Status.ERROR
    assert "killed by SIGKILL" in report.findings[-1].message
    assert session.run_checks(["S7"]).ok


def test_an_engine_that_does_not_start_says_what_it_printed(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no engine today')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with EngineSession("cupy") as session, pytest.raises(IsokernError, match="does not start: exited with status 1"):
        session.run_checks(["S7"])


def test_a_missing_engine_is_told_before_a_process_is_started(monkeypatch):
    monkeypatch.setattr(engines.shutil, "which", lambda program: None)
    with pytest.raises(MissingEngineError, match=r"needs g\+\+"):
        EngineSession("cupy")


def test_tests_of_a_missing_engine_fail_and_are_not_skipped(tmp_path):
    tests = Path(__file__).with_name("test_cupy_conformance.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", "S7 or M9"],
        env={**os.environ, "PATH": str(tmp_path)},
        cwd=tests.parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "needs g++" in done.stdout
    assert "2 errors" in done.stdout.splitlines()[-1]
    assert "skipped" not in done.stdout
