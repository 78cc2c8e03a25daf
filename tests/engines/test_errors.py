"""Bad input is refused before a launch; a kernel that fails to compile or launch is one typed error. On each engine."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from isokern.engines import ENGINES
from isokern.registry.ops.fused_sigmoid_gating.error_inputs import ERROR_INPUTS

_CASES = Path(__file__).with_name("error_cases.py")
BACKENDS = [pytest.param(name, marks=pytest.mark.engine(info.name)) for name, info in ENGINES.items()]


@cache
def results(backend):
    """What went wrong by case; one process per backend runs them all."""
    command = [sys.executable, str(_CASES), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bad_call_is_refused_before_anything_is_launched_or_written(backend):
    found = {name: what for name, what in results(backend).items() if name.startswith("refused: ")}
    assert len(found) == len(ERROR_INPUTS)
    wrong = [f"{name}: {what}" for name, what in found.items() if what]
    assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", ["without_a_fault_nothing_fails", "a_launch_that_fails", "a_config_that_does_not_compile"]
)
def test_a_failing_kernel_is_one_typed_error_and_writes_nothing(backend, case):
    what = results(backend)[f"case_{case}"]
    assert what == "", what
