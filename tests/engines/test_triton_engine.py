"""The Triton interpreter engine finds what it is there to find. Cases: ``triton_engine_cases``."""

import ast
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

_CASES = Path(__file__).with_name("triton_engine_cases.py")
_NAMES = [
    node.name
    for node in ast.parse(_CASES.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]


@lru_cache(maxsize=1)
def results():
    done = subprocess.run([sys.executable, str(_CASES)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engine("triton_interpreter")
@pytest.mark.parametrize("case", _NAMES)
def test_engine(case):
    assert results()[case] == "", results()[case]
