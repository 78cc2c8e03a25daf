"""Every config compiles for every architecture without a GPU, at the cost the checked-in table says.

Here the default configs and two others are compiled again; ``python -m isokern.backends.triton.resources`` does all.
"""

import json
from importlib.metadata import version

import pytest

from isokern.backends.triton.configs import configs
from isokern.backends.triton.resources import (
    ARCHITECTURES,
    PROBLEMS,
    TABLE,
    compile_config,
    fingerprint,
    load_table,
    problem_of,
    rows,
)

_TRITON, _ROWS = load_table()
#: A thread has at most 255 registers, and a program on the oldest architecture 99 KiB of shared memory at hand.
_REGISTERS, _SHARED = 255, 99 << 10


_AGAIN = "run python -m isokern.backends.triton.resources --write"


def test_the_table_was_made_from_these_sources():
    assert json.loads(TABLE.read_text())["fingerprint"] == fingerprint(), f"the kernel changed: {_AGAIN}"


def test_every_config_of_every_problem_is_in_it_for_every_architecture():
    assert {(name, arch, config.label) for name, _, arch, config in rows()} == set(_ROWS), _AGAIN
    assert {(name, arch) for name, arch, _ in _ROWS} == {(name, arch) for name in PROBLEMS for arch in ARCHITECTURES}


def test_default_configs_do_not_spill():
    for name, spec in PROBLEMS.items():
        default = configs(problem_of(spec))[0]
        for arch in ARCHITECTURES:
            row = _ROWS[name, arch, default.label]
            assert row.spilled == 0, (name, arch, row)


def test_every_row_can_be_launched():
    for key, row in _ROWS.items():
        assert row.registers <= _REGISTERS, key
        assert row.shared <= _SHARED, key


@pytest.mark.parametrize(
    ("name", "arch", "which"),
    [
        ("decode vk", 80, 0),
        ("decode vk", 100, 1),
        ("decode kv", 90, 0),
        ("prompts vk", 90, 0),
        ("prompts vk, KDA", 90, 0),
        ("tree vk", 100, 0),
    ],
)
def test_compiling_again_costs_what_the_table_says(name, arch, which):
    spec = PROBLEMS[name]
    config = configs(problem_of(spec))[which]
    made = compile_config(spec, config, arch)
    assert made.registers <= _REGISTERS
    if version("triton") == _TRITON:
        assert made == _ROWS[name, arch, config.label]
