"""The chunked CUDA C++ kernels compiled without a GPU: the checked-in table, and what must be in the machine code."""

import json

import pytest

from isokern.backends.cupy_chunked import resources
from isokern.backends.cupy_chunked.arguments import crossing_bytes, passing_bytes, record_bytes
from isokern.backends.cupy_chunked.backend import CupyChunked
from isokern.backends.cupy_chunked.configs import configs, shared_limit
from isokern.backends.cupy_chunked.resources import ARCHES, COLUMNS, KERNELS, TABLE
from isokern.backends.resource_rows import rows_of

pytestmark = pytest.mark.engine("cuda_on_cpu")
WRITTEN = json.loads(TABLE.read_text())
ROWS = {key: dict(zip(COLUMNS, row, strict=True)) for key, row in rows_of(WRITTEN).items()}
AGAIN = "run python -m isokern.backends.cupy_chunked.resources --write"


def test_the_table_was_made_from_these_sources():
    assert WRITTEN["fingerprint"] == resources.fingerprint(), f"the kernels changed: {AGAIN}"
    assert tuple(WRITTEN["columns"]) == COLUMNS


def test_the_table_covers_every_config_on_every_architecture():
    assert set(ROWS) == {key for key, _, _ in resources.rows()}, AGAIN
    assert {arch for _, arch, _ in ROWS} == set(ARCHES)


def test_everything_fits_its_chip():
    for (name, arch, label), row in ROWS.items():
        for kernel in KERNELS if "cut" in label else KERNELS[:2]:
            assert row[f"{kernel} shared"] <= shared_limit(arch), (name, arch, label)
            assert row[f"{kernel} warps"] >= 2, (name, arch, label)


def test_defaults_of_bfloat16_inputs_hardly_spill():
    # Three pieces of every operand are many registers: where each warp multiplies for itself some do not fit.
    for arch, most, most_prepared in ((80, 128, 24), (90, 0, 24), (100, 400, 32)):
        for name, problem in resources.problems(arch).items():
            if problem.io_dtype == "bfloat16" and problem.k <= 192:
                row = ROWS[name, arch, configs(problem, CupyChunked.pieces)[0].label]
                assert row["scan spills"] <= most, (name, arch)
                assert row["prepare spills"] <= most_prepared, (name, arch)


@pytest.mark.parametrize("arch", [80, 90])
def test_compiling_again_gives_the_same_numbers(arch):
    problem = resources.problems(arch)["fp32 kv"]
    config = configs(problem, CupyChunked.pieces)[0]
    made = dict(zip(COLUMNS, resources.measure(problem, config), strict=True))
    listed = ROWS["fp32 kv", arch, config.label]
    for column in COLUMNS:
        if not column.endswith("warps"):
            # another assembler may allocate a little differently
            assert abs(made[column] - listed[column]) <= (8 if column.endswith("registers") else 0), column


def test_a_record_is_as_large_as_the_kernels_take_it_to_be():
    for pieces in (1, 2, 3):
        assert record_bytes(pieces) == pieces * 2 * 12 * 32 * 16 + 3 * 64 * 4 + 16
        assert record_bytes(pieces) % 16 == 0
        assert passing_bytes(pieces) % 16 == 0
    assert crossing_bytes(20, 24) == (20 + 24) * 32 * 4
