"""Every config compiles for every architecture without a GPU, at the cost the checked-in table says.

Here the default configs and two others are compiled again; ``python -m isokern.backends.triton.resources`` does all.
"""

from importlib.metadata import version

import pytest

from isokern.backends.triton.configs import configs
from isokern.backends.triton.resources import ARCHITECTURES, PROBLEMS, compile_config, load_table, problem_of

_TRITON, _ROWS = load_table()
#: A thread has at most 255 registers, and a program on the oldest architecture 99 KiB of shared memory at hand.
_REGISTERS, _SHARED = 255, 99 << 10


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_table_lists_the_default_config_for_every_architecture(name):
    default = configs(problem_of(PROBLEMS[name]))[0]
    for arch in ARCHITECTURES:
        assert (name, arch, default.label) in _ROWS


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
