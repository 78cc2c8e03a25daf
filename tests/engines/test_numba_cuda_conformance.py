"""The conformance suite over the Numba CUDA backend, executed on a CPU, one check at a time."""

import pytest

from isokern.engines.numba_simulator.engine import NumbaSimulator, SimulatedNumbaCuda
from isokern.registry.conformance.check import Needs, Tier
from isokern.registry.conformance.runner import run_checks
from isokern.registry.ops.fused_sigmoid_gating.checks import CHECKS

_IDS = [c.id for c in CHECKS if c.tier is Tier.FAST and c.needs not in (Needs.CPU, Needs.GPU)]


@pytest.fixture(scope="module")
def engine():
    return NumbaSimulator()


@pytest.mark.engine("numba_simulator")
@pytest.mark.parametrize("check", _IDS)
def test_conforms(engine, check):
    report = run_checks("fused_sigmoid_gating", SimulatedNumbaCuda(engine), only=[check], engine=engine)
    assert not report.skipped
    assert report.ok, report.describe_failures()
