"""Every backend that comes with isokern against every check of the op, and the named scenarios."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from isokern import registry
from isokern.backends import BUILTIN_BACKENDS
from isokern.engines import ENGINES
from isokern.registry.backend import Backend
from isokern.registry.conformance.check import Declined, Needs, Status, Tier
from isokern.registry.conformance.exceptions import exceptions_path, load_exceptions
from isokern.registry.conformance.runner import run_checks
from isokern.registry.conformance.subject import Subject
from isokern.registry.ops.fused_sigmoid_gating.cases import CASES, SCENARIOS, case
from isokern.registry.ops.fused_sigmoid_gating.checks import CHECKS
from isokern.registry.ops.fused_sigmoid_gating.checks.compare import Recipe, exact, near
from isokern.registry.ops.fused_sigmoid_gating.checks.kwargs import fresh, with_slots
from isokern.registry.ops.fused_sigmoid_gating.checks.packing import packed_equals_alone
from isokern.registry.ops.fused_sigmoid_gating.checks.trial import Trial, bits

OP = "fused_sigmoid_gating"
#: Backends that need no GPU; the others are examined in ``tests/engines``. A missing one fails, it is never skipped.
NAMES = ("torch_reference", "torch_vectorized", "torch_chunked", "numba_cpu", "composite")
#: Those that run a batch of nearly equal lengths: there is nothing for a composite to split.
ON_EQUAL = NAMES[:-1]
#: What applies on this machine; engine and GPU checks belong to other jobs.
HERE = [c.id for c in CHECKS if c.needs in (Needs.ANY, Needs.CPU, Needs.HOST) and c.tier is Tier.FAST]


@pytest.fixture(autouse=True)
def one_thread():
    """The cases are small: more threads only wait for each other. S5 sets its own numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def builtin(name: str) -> Backend:
    return registry.backends(OP)[name]


def subject_of(name: str) -> Subject:
    backend = builtin(name)
    return Subject(backend, exceptions=load_exceptions(OP, backend))


def test_every_backend_is_examined_here_or_in_an_engine():
    external = {name for name, b in registry.backends(OP).items() if b.provenance == "external"}  # test_external.py
    assert len(BUILTIN_BACKENDS[OP]) == len({*NAMES, *ENGINES, *external})
    assert {*NAMES, *ENGINES} <= set(registry.backends(OP))


@pytest.mark.parametrize("check", HERE)
@pytest.mark.parametrize("name", NAMES)
def test_backend_conforms(name, check, conformance):
    report = run_checks(OP, builtin(name), only=[check])
    conformance(report)
    assert not report.failures, report.describe_failures()
    assert not report.undeclared, "every case is declined, and the exceptions file does not say so"
    assert report.ok or load_exceptions(OP, builtin(name)).declines(check)


@pytest.mark.parametrize("name", ON_EQUAL)
def test_packed_5_7_6_equals_each_sequence_alone(name):
    """Bit for bit in the reference and numba; within the bound where a matrix product's order depends on the batch."""
    ratio = packed_equals_alone(subject_of(name), SCENARIOS["packed 5,7,6"])
    if name in ("torch_reference", "numba_cpu"):
        assert ratio is None
    else:
        assert ratio is None or ratio <= 2


@pytest.mark.parametrize("name", ON_EQUAL)
def test_packed_4_6_5_on_slots_0_2_1_of_5_updates_exactly_those_states(name):
    kwargs = with_slots(fresh(SCENARIOS["slots 0,2,1 of 5"]), (0, 2, 1))
    pool = kwargs["initial_state_source"]
    assert len(pool) == 5
    before = pool.clone()
    trial = Trial(kwargs)
    trial.run(subject_of(name))
    changed = [not torch.equal(bits(before[slot]), bits(pool[slot])) for slot in range(5)]
    assert changed == [True, True, True, False, False]
    trial.check_untouched()  # the guard slots around the pool, too


@pytest.mark.parametrize("name", ["torch_vectorized", "torch_chunked", "numba_cpu", "composite"])
@pytest.mark.parametrize("of", ["mixed", "mixed float32", "typical kda", "vk kda", "one long, many short"])
def test_backends_agree_within_the_bound(name, of):
    recipe = Recipe(case(of))
    subject = subject_of(name)
    trial = recipe.trial(subject)
    ref = exact(recipe, subject.chunk(trial.call))
    near(trial.run(subject), recipe.trial(subject).run(subject_of("torch_reference")), ref, 2.0)


# ---- the list of cases


def test_each_tag_holds_what_the_one_before_it_holds():
    assert set(CASES["smoke"]) < set(CASES["core"]) < set(CASES["extended"])
    assert set(CASES["scenarios"]) <= set(CASES["core"])


def test_names_are_unique():
    names = [spec.name for spec in CASES["extended"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("spec", CASES["extended"], ids=lambda s: s.name)
def test_every_case_is_a_valid_call(spec):
    from isokern.registry.ops.fused_sigmoid_gating.validate_values import check_values

    trial = Trial.of(spec)
    check_values(trial.call)
    assert spec.v != spec.k  # equal ones hide a transposed state


def test_the_reference_declines_no_case_of_the_list():
    subject = subject_of("torch_reference")
    for spec in CASES["extended"]:
        try:
            subject.config_for(Trial.of(spec).call.problem())
        except Declined as declined:
            pytest.fail(f"{spec.name}: {declined}")


# ---- the suite as a whole


def test_check_ids_are_unique_and_cover_the_table():
    ids = [c.id for c in CHECKS]
    assert len(ids) == len(set(ids))
    table = {f"N{i}" for i in range(1, 9)} | {f"M{i}" for i in range(1, 13)} | {f"S{i}" for i in range(1, 8)} | {"X1"}
    assert table <= set(ids)


def test_engine_checks_wait_for_an_engine():
    assert {c.id for c in CHECKS if c.needs is Needs.ENGINE} == {"S4E", "S5E"}


def test_exceptions_files_belong_to_a_backend():
    folder = exceptions_path(OP, builtin("torch_reference")).parent
    assert {file.stem for file in folder.glob("*.toml")} <= set(registry.backends(OP))


def test_the_reference_s_promises_are_held_bit_for_bit():
    granted = load_exceptions(OP, builtin("torch_reference")).entries
    assert not {"M1", "M2", "M3", "M4"} & set(granted)


@pytest.mark.parametrize("place", [0, 39, 40, 12_345, -1])
def test_every_output_value_is_compared(place):
    """One wrong value anywhere in the output must fail N1: the comparison leaves out no row, head or column."""
    inner = builtin("torch_reference")

    class OneOff(type(inner)):
        name = "one_off"

        def bind(self, problem, config):
            runner = super().bind(problem, config)

            def run(call):
                out = runner(call)
                out.view(-1)[place % out.numel()] += 1e-3
                return out

            return run

    report = run_checks(OP, OneOff(), only=["N1"], peers=(), fail_fast=True)
    assert report.failed_checks == ("N1",)
    assert report.failures[0].status is Status.FAIL
    assert math.isfinite(report.failures[0].ratio)
