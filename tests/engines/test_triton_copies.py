"""The kernels that say what bandwidth Triton reaches copy what they should, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "triton_copies.py"


@pytest.mark.engine("triton_interpreter")
def test_every_kernel_copies_rightly():
    run = [sys.executable, BENCHMARK, "--check", "--dtype", "float16"]
    done = subprocess.run(run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    checked, _, total, *_ = done.stdout.split()
    assert checked == total
    assert int(total) > 20
