"""The conformance suite over the Triton backend, interpreted on the CPU, one check and one process at a time."""

import subprocess
import sys

import pytest

from isokern.registry.conformance.check import Needs, Tier
from isokern.registry.ops.fused_sigmoid_gating.checks import CHECKS

_IDS = [c.id for c in CHECKS if c.tier is Tier.FAST and c.needs not in (Needs.CPU, Needs.GPU)]


@pytest.mark.engine("triton_interpreter")
@pytest.mark.parametrize("check", _IDS)
def test_conforms(check):
    command = [sys.executable, "-m", "isokern.engines.triton_interpreter", "--quiet", "--check", check]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


_ON_HOST_TENSORS = """
import sys
from isokern.engines.triton_interpreter import InterpretedBackend, activate
activate()
from isokern.backends.triton.backend import Triton
from isokern.registry.conformance.subject import Subject
from isokern.registry.ops.fused_sigmoid_gating.checks import CHECKS

(check,) = (c for c in CHECKS if c.id == sys.argv[1])
findings = list(check.run(Subject(InterpretedBackend(Triton()))))
assert len(findings) >= 9
for finding in findings:
    print(finding)
    assert finding.status == "pass", finding
"""


@pytest.mark.engine("triton_interpreter")
@pytest.mark.parametrize("check", ["S4", "S6"])
def test_conforms_on_host_tensors(check):
    """Checks that lean on host memory and not on an engine: NaN around the inputs, offsets beyond 2**31."""
    command = [sys.executable, "-c", _ON_HOST_TENSORS, check]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
