"""Faults planted in kernels: the engine or the suite finds each, and nothing without a fault.

Those of the recurrent CUDA C++ kernel are in ``test_cupy_faults``, but for what asynchronous copies show.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from isokern.engines import ENGINES

sys.path.insert(0, str(Path(__file__).parent))
from planted_faults import FAULTS

_CASES = Path(__file__).with_name("fault_cases.py")


@cache
def results(backend):
    """Empty by fault if it was found as it should be; one run per backend."""
    done = subprocess.run([sys.executable, str(_CASES), backend], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def backends():
    return [pytest.param(name, marks=pytest.mark.engine(ENGINES[name].name)) for name in FAULTS]


@pytest.mark.parametrize("backend", backends())
def test_nothing_is_found_without_a_fault(backend):
    assert results(backend)["without a fault"] == ""


@pytest.mark.parametrize(
    ("backend", "fault"),
    [
        pytest.param(*parameter.values, fault, marks=parameter.marks, id=f"{parameter.values[0]}: {fault}")
        for parameter in backends()
        for fault in FAULTS[parameter.values[0]]
    ],
)
def test_a_planted_fault_is_found(backend, fault, record_property):
    what = results(backend)[fault]
    assert what == "", what
    record_property("planted fault", f"{backend:11} {fault:50} found by {FAULTS[backend][fault][3]}")
