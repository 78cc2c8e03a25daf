"""Who is left out of a warm-up because an H100 has shown that it loses, and that nobody else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isokern import registry
from isokern.autotune.candidates import admit
from isokern.autotune.spared import outclassed, spared
from isokern.registry.backend import Backend, Config
from isokern.registry.core import Registry
from isokern.registry.decision import Accepted, RejectCode
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC

OP = "fused_sigmoid_gating"
ROWS = CaseSpec("rows", (1,) * 8, h=16, hv=32, k=128, v=128, state_layout="kv")
CHAIN = ROWS.but(lengths=(4,) * 4, verify="chain")
TREE = ROWS.but(lengths=(8,) * 4, verify="tree")


def on_h100(spec):
    return describe(spec, "cuda", 90)


def left_out(name, problem):
    backend = registry.backends(OP)[name]
    return spared(backend, backend.configs(problem), problem)


@pytest.mark.parametrize("name", ["numba_cuda", "triton"])
@pytest.mark.parametrize(("spec", "tried"), [(ROWS, 8), (ROWS.but(lengths=(64,)), 8), (TREE, 4)])
def test_of_some_backends_only_the_settings_most_like_the_default_are_tried(name, spec, tried):
    offered = tuple(registry.backends(OP)[name].configs(on_h100(spec)))
    found = left_out(name, on_h100(spec))
    assert [c for c in offered if c not in found] == list(offered[:tried])
    assert all(f"the first {tried} settings" in reason for reason in found.values())


@pytest.mark.parametrize("spec", [CHAIN, TREE], ids=["chain", "tree"])
def test_of_verification_the_ways_to_read_tokens_that_lose_by_far_are_not_tried(spec):
    offered = tuple(registry.backends(OP)["cupy"].configs(on_h100(spec)))
    found = left_out("cupy", on_h100(spec))
    assert offered[0] not in found, "the default always races"
    assert {c for c in offered[1:] if not c["staged"]} <= set(found)
    assert 0 < len(found) < len(offered) - 1
    assert not left_out("cupy", on_h100(ROWS))


@pytest.mark.parametrize(
    "problem",
    [
        describe(ROWS, "cuda", 100),
        on_h100(ROWS.but(state_layout="vk")),
        on_h100(ROWS.but(is_kda=True)),
        on_h100(ROWS.but(k=64, v=64)),
        on_h100(ROWS.but(state_dtype="bfloat16")),
        on_h100(ROWS.but(lengths=(1,) * 512)),
        on_h100(TREE.but(lengths=(8,) * 8)),
    ],
    ids=["another chip", "another layout", "KDA", "other dims", "narrow states", "more rows", "a larger tree"],
)
def test_nothing_is_said_of_what_was_not_measured(problem):
    for name in ("numba_cuda", "triton", "cupy"):
        assert not left_out(name, problem)


def test_frameworks_need_not_be_tried_beside_kernels_on_a_gpu():
    for name, backend in registry.backends(OP).items():
        if type(backend).__module__.startswith("isokern."):
            assert (outclassed(backend, on_h100(ROWS)) is not None) == name.startswith("torch_"), name
            assert outclassed(backend, describe(ROWS, "cpu", 0)) is None


def test_another_backend_of_that_name_is_tried():
    class Mine(Backend):
        op, name, provenance = OP, "triton", "torch"

        def check(self, problem):
            return Accepted()

        def bind(self, problem, config):
            raise NotImplementedError

    many = [Config.of(setting=i) for i in range(20)]
    assert not spared(Mine(), many, on_h100(ROWS))
    assert outclassed(Mine(), on_h100(ROWS)) is None


def own_registry(*names):
    own = Registry({}, load_plugins=False)
    own.register_op(SPEC)
    for name in names:
        own.register_backend(registry.backends(OP)[name])
    return own


def test_what_is_not_tried_is_listed_with_its_settings_and_the_reason():
    own = own_registry("numba_cuda", "torch_vectorized")
    admission = admit(own, OP, on_h100(ROWS))
    offered = {c.label for c in registry.backends(OP)["numba_cuda"].configs(on_h100(ROWS))}
    tried = {c.config.label for c in admission.candidates}
    listed = {Config.from_dict(r.config).label for r in admission.declined if r.backend == "numba_cuda"}
    assert len(tried) == 8
    assert not tried & listed
    assert tried | listed == offered
    assert {r.code for r in admission.declined} == {RejectCode.HOPELESS.value}
    assert all(r.reason for r in admission.declined)


def test_one_that_was_chosen_before_is_tried_all_the_same():
    own = own_registry("numba_cuda")
    left = next(r for r in admit(own, OP, on_h100(ROWS)).declined)
    admission = admit(own, OP, on_h100(ROWS), keep={left.label})
    assert left.label in {c.name for c in admission.candidates}
    assert left.label not in {r.label for r in admission.declined}


def test_frameworks_are_tried_where_there_is_nothing_else():
    admission = admit(own_registry("torch_vectorized"), OP, replace(on_h100(ROWS), mode="eager"))
    assert {c.backend for c in admission.candidates} == {"torch_vectorized"}
