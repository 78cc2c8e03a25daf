"""Every config of the chunked Triton kernels compiles for every architecture without a GPU, as the table says.

Here two are compiled again; ``python -m isokern.backends.triton_chunked.resources`` does all.
"""

import json
from importlib.metadata import version

import pytest

from isokern.backends.triton_chunked.configs import configs
from isokern.backends.triton_chunked.resources import (
    ARCHITECTURES,
    COLUMNS,
    PROBLEMS,
    TABLE,
    fingerprint,
    load_table,
    measure,
    problem_at,
    rows,
)

_TRITON, _ROWS = load_table()
#: A thread has at most 255 registers, and a program on the oldest architecture 99 KiB of shared memory at hand.
_REGISTERS, _SHARED = 255, 99 << 10
#: A kernel of fewer registers does nothing but stop: what Triton makes of one that it has no room for.
_TRAP = 31
_AGAIN = "run python -m isokern.backends.triton_chunked.resources --write"


def test_the_table_was_made_from_these_sources():
    assert json.loads(TABLE.read_text())["fingerprint"] == fingerprint(), f"the kernels changed: {_AGAIN}"


def test_every_config_of_every_problem_is_in_it_for_every_architecture():
    assert {(name, arch, config.label) for name, arch, config in rows()} == set(_ROWS), _AGAIN
    pairs = {(name, arch) for name in PROBLEMS for arch in ARCHITECTURES}
    assert pairs - {(name, arch) for name, arch, _ in _ROWS} == {("prompts vk, KDA", 100)}


def test_every_row_can_be_launched():
    for key, row in _ROWS.items():
        figures = dict(zip(COLUMNS, row, strict=True))
        for kernel in ("prepare", "scan"):
            assert _TRAP < figures[f"{kernel} registers"] <= _REGISTERS, key
            assert figures[f"{kernel} shared"] <= _SHARED, key


@pytest.mark.parametrize(("name", "arch", "which"), [("prompts vk", 90, 0), ("prompts vk", 80, 0)])
def test_compiling_again_costs_what_the_table_says(name, arch, which):
    config = configs(problem_at(name, arch))[which]
    made = measure(name, arch, config)
    if version("triton") == _TRITON:
        assert made == _ROWS[name, arch, config.label]
