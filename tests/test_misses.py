"""Calls that ran untuned become a workload; warming that up answers exactly those calls."""

from __future__ import annotations

import random

import pytest

from isokern.autotune.misses import save_misses
from isokern.cache import Layer, Store
from isokern.registry.core import Registry
from isokern.registry.ops.fused_sigmoid_gating.catalogue import model
from isokern.registry.ops.fused_sigmoid_gating.concrete import concrete
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.misses import cases_of, lengths_of
from isokern.registry.ops.fused_sigmoid_gating.workload_case import parse_case
from isokern.registry.ops.fused_sigmoid_gating.workloads import Tier, default_cases, load_workloads
from isokern.registry.varlen.classes import LengthClass
from isokern.registry.varlen.profile import VarlenProfile

OP = "fused_sigmoid_gating"
MODEL = "qwen3-next-80b-a3b"
SHARD = model(MODEL).shard(8)


def problem_of(name: str, mode="graph", **changes):
    return describe(concrete(SHARD, parse_case(name)).but(**changes), "cuda", 90, mode)


@pytest.mark.parametrize("case", default_cases(Tier.FULL), ids=lambda c: c.name)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_every_kind_of_call_comes_back_as_a_case_of_the_same_key(case, mode):
    problem = describe(concrete(SHARD, case), "cuda", 90, mode)
    [recorded] = cases_of({problem: 1})
    assert not recorded.left_out
    [found] = recorded.cases
    assert describe(concrete(SHARD, found), "cuda", 90, found.policy.value).tuning_key() == problem.tuning_key()
    assert (MODEL, 8) in recorded.models


def test_made_up_lengths_fall_into_the_profile_they_stand_for():
    draw = random.Random(0)
    for _ in range(300):
        lengths = [draw.choice([1, draw.randint(1, 40), draw.randint(1, 3000)]) for _ in range(draw.randint(1, 60))]
        profile = VarlenProfile.of(len(lengths), sum(lengths), max(lengths))
        found = lengths_of(profile)
        assert found is not None, profile
        assert VarlenProfile.of(len(found), sum(found), max(found)) == profile


def test_calls_that_no_warm_up_helps_are_left_out_with_the_reason():
    unknown = problem_of("prefill 4x256")
    unknown = type(unknown)(
        **{
            **{name: getattr(unknown, name) for name in unknown.__dataclass_fields__},
            "profile": VarlenProfile(4, 1024, None, LengthClass.UNKNOWN),
        }
    )
    strided = problem_of("decode N=8", strides="any")
    [recorded] = cases_of({unknown: 1, strided: 1})
    reasons = dict(recorded.left_out)
    assert not recorded.cases
    assert "pass a SequenceLayout, or max_seqlen=" in reasons[unknown]
    assert reasons[strided] == "a warm-up tunes strides=dense (here any)"


def test_a_call_that_no_workload_has_is_left_out_and_takes_no_other_along():
    one, odd = problem_of("decode N=8"), problem_of("decode N=8", state_dtype="float64")
    recorded = cases_of({one: 1, odd: 1})
    assert [case.name for shape in recorded for case in shape.cases] == ["decode N=8 float32 graph"]
    [(problem, reason)] = [pair for shape in recorded for pair in shape.left_out]
    assert problem == odd
    assert "state_dtype: expected" in reason


def test_the_most_often_missed_come_first_and_shapes_apart():
    one, two = problem_of("decode N=1"), problem_of("decode N=64")
    other = describe(concrete(model(MODEL).shard(4), parse_case("decode N=8")), "cuda", 90, "graph")
    recorded = cases_of({one: 1, two: 5, other: 3})
    assert [[c.name for c in r.cases] for r in recorded] == [
        ["decode N=64 float32 graph", "decode N=1 float32 graph"],
        ["decode N=8 float32 graph"],
    ]


def test_a_program_writes_what_it_missed_and_a_warm_up_reads_it(tmp_path):
    registry = Registry(load_plugins=False)
    registry.use_store(Store([Layer("user", tmp_path / "empty")]))
    op = registry.get(OP)
    for name in ("decode N=2", "prefill short 1x16", "decode N=2"):
        op(**make_inputs(concrete(SHARD, parse_case(name))).kwargs)
    [(path, recorded)] = save_misses(tmp_path / "missed.yaml", registry).items()
    cases = load_workloads(path)
    assert cases == recorded.cases
    assert {c.name for c in cases} == {"decode N=2 float32 eager", "prefill short 1x16 float32 eager"}
    assert f"isokern warmup --model {MODEL} --tp 8 --workloads missed.yaml" in path.read_text()


def test_without_a_miss_nothing_is_written(tmp_path):
    registry = Registry(load_plugins=False)
    assert save_misses(tmp_path / "missed.yaml", registry) == {}
    assert not list(tmp_path.iterdir())
