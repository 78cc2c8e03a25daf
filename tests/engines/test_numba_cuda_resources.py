"""Compiled without a GPU: registers, spills, shared memory as the checked-in table has them; what is in the PTX."""

import json
import re
from dataclasses import replace

import pytest

from isokern.backends.numba_cuda import compile as compiling
from isokern.backends.numba_cuda.resources import (
    ARCHITECTURES,
    PROBLEMS,
    TABLE,
    fingerprint,
    load_table,
    measured,
    problem_of,
    rows,
)
from isokern.backends.numba_cuda.space import default_for
from isokern.backends.numba_cuda.variant import Variant

ROWS = load_table()
AGAIN = "run python -m isokern.backends.numba_cuda.resources --write"


def test_the_table_was_made_from_these_sources():
    assert json.loads(TABLE.read_text())["fingerprint"] == fingerprint(), f"the kernel changed: {AGAIN}"


def test_the_table_covers_every_config_on_every_architecture():
    assert set(ROWS) == {(name, arch, config.label) for name, config, arch in rows()}, AGAIN
    assert {(name, arch) for name, arch, _ in ROWS} == {(name, arch) for name in PROBLEMS for arch in ARCHITECTURES}


def test_everything_fits_and_no_array_lives_in_local_memory():
    for key, row in ROWS.items():
        assert row.registers <= 255, key
        assert row.shared <= 48 * 1024, key
        assert row.stack <= row.spill_stores + row.spill_loads, f"more stack than spills: an array? {key}"


def test_defaults_do_not_spill_on_hopper_and_blackwell():
    for name in PROBLEMS:
        for arch in (90, 100):
            row = ROWS[name, arch, default_for(problem_of(name, arch)).label]
            assert row.spill_stores == row.spill_loads == 0, (name, arch)


@pytest.mark.parametrize("name", ["decode, float32 vk", "prompts, kda"])
def test_compiling_again_gives_the_same_numbers(name):
    config = default_for(problem_of(name, 90))
    row, again = ROWS[name, 90, config.label], measured(name, config, 90)
    assert abs(again.registers - row.registers) <= 8  # another assembler may allocate a little differently
    assert replace(again, registers=row.registers, spill_loads=row.spill_loads) == row


def test_states_move_in_vectors_and_sums_do_not_depend_on_fusing():
    problem = problem_of("decode, float32 vk", 90)
    variant = Variant.of(problem, default_for(problem), wide=True)
    ptx = compiling._ptx(variant)
    vectors = variant.columns * variant.pieces
    assert len(re.findall(r"ld\.global\.v4\.f32", ptx)) == vectors
    assert len(re.findall(r"st\.global\.v4\.f32", ptx)) == vectors
    assert "__local_depot" not in ptx
    assert variant.shared_bytes <= 48 * 1024
    assert len(ARCHITECTURES) == 3


@pytest.mark.parametrize(("name", "dtype"), [("decode, bfloat16 kv", "bf16"), ("prompts, K=96 V=192", "f16")])
def test_stores_round_to_nearest_even(name, dtype):
    """The engine on a CPU stores by itself; what the GPU's stores do is read off the code."""
    problem = problem_of(name, 90)
    ptx = compiling._ptx(Variant.of(problem, default_for(problem), wide=True))
    narrowing = set(re.findall(rf"cvt\.\w+\.{dtype}(?:x2)?\.f32", ptx))
    assert narrowing
    assert all(conversion.startswith("cvt.rn.") for conversion in narrowing)
