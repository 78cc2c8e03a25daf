"""What makes the Triton backend compile: dtypes do; lengths, their number, slots and padding do not."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest


@lru_cache(maxsize=1)
def compiled():
    script = Path(__file__).with_name("triton_launch_cases.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("series", ["lengths and their number", "slots", "batches", "trees"])
def test_one_kernel_serves_all(series):
    assert compiled()[series] == 1


def test_another_dtype_is_another_kernel():
    assert compiled()["dtypes"] == 2
