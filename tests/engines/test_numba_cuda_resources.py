"""Compiled without a GPU: registers, spills, shared memory as the checked-in table has them; what is in the PTX."""

import json
import re

import pytest

from isokern.backends.numba_cuda import compile as compiling
from isokern.backends.numba_cuda.resources import (
    ARCHITECTURES,
    TABLE,
    entries,
    fingerprint,
    measured,
    problem_of,
)
from isokern.backends.numba_cuda.space import default_for
from isokern.backends.numba_cuda.variant import Variant

DATA = json.loads(TABLE.read_text())
ROWS = DATA["entries"]
AGAIN = "run python -m isokern.backends.numba_cuda.resources"


def test_the_table_was_made_from_these_sources():
    assert DATA["fingerprint"] == fingerprint(), f"the kernel changed: {AGAIN}"


def test_the_table_covers_every_config_on_every_architecture():
    listed = [(row["problem"], row["config"], row["arch"]) for row in ROWS]
    assert listed == [(name, config.label, arch) for name, config, arch in entries()], AGAIN


def test_everything_fits_and_no_array_lives_in_local_memory():
    for row in ROWS:
        assert row["registers"] <= 255, row
        assert row["shared"] <= 48 * 1024, row
        assert row["stack"] <= row["spill_stores"] + row["spill_loads"], f"more stack than spills: an array? {row}"


def test_defaults_do_not_spill_on_hopper_and_blackwell():
    for row in ROWS:
        name = row["problem"]
        if row["arch"] >= 90 and row["config"] == default_for(problem_of(name, row["arch"])).label:
            assert row["spill_stores"] == row["spill_loads"] == 0, row


@pytest.mark.parametrize("name", ["decode, float32 vk", "prompts, kda"])
def test_compiling_again_gives_the_same_numbers(name):
    config = default_for(problem_of(name, 90))
    (row,) = (r for r in ROWS if (r["problem"], r["config"], r["arch"]) == (name, config.label, 90))
    again = measured(name, config, 90)
    assert abs(again["registers"] - row["registers"]) <= 8  # another assembler may allocate a little differently
    assert {k: again[k] for k in ("stack", "spill_stores", "shared")} == {
        k: row[k] for k in ("stack", "spill_stores", "shared")
    }


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
