"""One engine process per test process and backend, shared by all tests that ask it for checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from isokern import registry
from isokern.engines.session import EngineSession
from isokern.registry.conformance.check import Needs, Status, Tier
from isokern.registry.conformance.exceptions import load_exceptions
from isokern.registry.conformance.report import Report
from isokern.registry.ops.fused_sigmoid_gating.checks import CHECKS

OP = "fused_sigmoid_gating"
#: What an engine can examine: everything but what needs a GPU, or threads of the host.
ENGINE_CHECKS = [c.id for c in CHECKS if c.tier is Tier.FAST and c.needs not in (Needs.CPU, Needs.GPU)]


def pytest_generate_tests(metafunc):
    if "engine_check" in metafunc.fixturenames:
        metafunc.parametrize("engine_check", ENGINE_CHECKS)


@pytest.fixture(scope="session")
def engine_session() -> Iterator[Callable[[str], EngineSession]]:
    sessions: dict[str, EngineSession] = {}

    def get(backend: str) -> EngineSession:
        if backend not in sessions:
            sessions[backend] = EngineSession(backend)
        return sessions[backend]

    yield get
    for session in sessions.values():
        session.close()


@pytest.fixture
def conforms(engine_session, conformance) -> Callable[[str, str], Report]:
    """Examines a backend by one check in its engine, for the table at the end too.

    Nothing may fail or be skipped, and something must pass, unless the backend declares that it declines every case.
    """

    def examine(backend: str, check: str) -> Report:
        report = engine_session(backend).run_checks([check])
        conformance(report)
        assert not report.skipped
        assert not report.undeclared
        declared = load_exceptions(OP, registry.backends(OP)[backend]).declines(check)
        if not declared or any(f.status is not Status.DECLINED for f in report.findings):
            assert report.ok, report.describe_failures()
            assert any(f.status is Status.PASS for f in report.findings)
        return report

    return examine
