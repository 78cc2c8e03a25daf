"""The GPU backends as everybody meets them: registered, lazy, declining CPU tensors with a reason, at no cost."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from isokern import engines, registry
from isokern.autotune.candidates import admit
from isokern.backends import BUILTIN_BACKENDS
from isokern.backends.composite.backend import Composite
from isokern.engines import ENGINES, MissingEngineError, engine_for
from isokern.registry import FunctionBackend, RejectCode
from isokern.registry.core import Registry
from isokern.registry.doctor import examine
from isokern.registry.explain import render
from isokern.registry.ops.fused_sigmoid_gating.cases import BASE, CASES
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.plugins import load_attribute, missing_modules
from isokern.registry.selection import verdicts

OP = "fused_sigmoid_gating"
#: Those that do the whole contract, token by token.
GPU = ("triton", "cupy", "numba_cuda")
CHUNKED, ROUNDED = "cupy_chunked", "cupy_chunked_bf16"
CUT = ("cupy_cut", "cupy_cut_bf16")
FRAMEWORKS = ("triton", "cupy", "numba", "llvmlite", "cuda")


def on_gpu(spec):
    return describe(spec, "cuda", 90)


def test_they_are_registered_and_each_has_an_engine():
    own = {*GPU, CHUNKED, "triton_chunked", ROUNDED, *CUT, "composite_bf16"}
    assert own == set(ENGINES) < set(registry.backends(OP))


def test_rounded_operands_are_for_those_who_name_them():
    problem = on_gpu(BASE.but(lengths=(2000,), padded=()))
    backends = {name: registry.backends(OP)[name] for name in (CHUNKED, ROUNDED)}
    assert not missing_modules(backends[ROUNDED]), "CuPy is needed here, though no GPU"
    unasked = {o.backend: o.verdict for o in verdicts(backends, problem)}
    assert unasked[CHUNKED]
    assert not unasked[ROUNDED]
    assert unasked[ROUNDED].code is RejectCode.POLICY
    assert all(outcome.verdict for outcome in verdicts(backends, problem, {ROUNDED}))
    assert ROUNDED not in Composite().parts()


def test_no_rounded_candidate_is_tuned():
    own = Registry({}, load_plugins=False)
    own.register_op(SPEC)
    for name in (CHUNKED, ROUNDED):
        own.register_backend(registry.backends(OP)[name])
    admission = admit(own, OP, on_gpu(BASE.but(lengths=(2000,), padded=())))
    assert {candidate.backend for candidate in admission.candidates} == {CHUNKED}
    assert [(record.backend, record.code) for record in admission.declined] == [(ROUNDED, RejectCode.POLICY.value)]


@pytest.mark.parametrize(
    ("lengths", "hv", "tried"),
    [
        ((1,) * 8, 2, {"cupy"}),
        ((8,) * 16, 2, {"cupy"}),
        ((500,), 2, {"cupy", CHUNKED}),
        ((1000,) * 64, 8, {"cupy", CHUNKED}),
        ((2000,), 2, {"cupy", CHUNKED, CUT[0]}),
    ],
)
def test_what_is_known_to_lose_is_not_tried(lengths, hv, tried):
    own = Registry({}, load_plugins=False)
    own.register_op(SPEC)
    for name in ("cupy", CHUNKED, CUT[0]):
        own.register_backend(registry.backends(OP)[name])
    admission = admit(own, OP, on_gpu(BASE.but(lengths=lengths, padded=(), h=1, hv=hv, v=128)))
    assert {candidate.backend for candidate in admission.candidates} == tried
    left_out = {record.backend: record for record in admission.declined}
    assert set(left_out) == {"cupy", CHUNKED, CUT[0]} - tried
    assert all(record.code == RejectCode.HOPELESS.value and record.reason for record in left_out.values())


def test_what_would_lose_is_tried_where_there_is_nothing_else():
    own = Registry({}, load_plugins=False)
    own.register_op(SPEC)
    own.register_backend(registry.backends(OP)[CHUNKED])
    admission = admit(own, OP, on_gpu(BASE.but(lengths=(1, 1), padded=())))
    assert {candidate.backend for candidate in admission.candidates} == {CHUNKED}
    assert not admission.declined


def test_prompts_go_to_the_chunked_one_and_the_rest_to_the_recurrent_ones():
    chunked, recurrent = registry.backends(OP)[CHUNKED], registry.backends(OP)["cupy"]
    prompt, short = on_gpu(BASE.but(lengths=(2000,), padded=())), on_gpu(BASE)
    assert chunked.rank(prompt) > recurrent.rank(prompt)
    assert chunked.rank(short) < recurrent.rank(short)


def test_the_triton_one_takes_gates_by_key_and_is_left_to_the_tuner():
    backend = registry.backends(OP)["triton_chunked"]
    prompt = BASE.but(lengths=(2000,), padded=(), h=1, hv=4, k=128, v=128)
    for spec in (prompt, prompt.but(is_kda=True), prompt.but(k=96, v=192, io_dtype="float32")):
        problem = on_gpu(spec)
        assert backend.check(problem)
        assert backend.rank(problem) < min(registry.backends(OP)[name].rank(problem) for name in GPU)
        assert all(config["chunk"] == 64 for config in backend.configs(problem))
        assert backend.hopeless(problem) is None
    assert backend.check(describe(prompt.but(is_kda=True), "cuda", 100)).code is RejectCode.ARCH
    assert backend.check(describe(prompt, "cuda", 100))
    for spec, code in ((BASE.but(verify="chain"), RejectCode.FEATURE), (BASE.but(k=512), RejectCode.SHAPE)):
        assert backend.check(on_gpu(spec)).code is code
    assert "16 tokens" in backend.hopeless(on_gpu(BASE.but(lengths=(8, 16), padded=())))


@pytest.mark.parametrize(("n", "hv", "columns"), [(8, 32, 32), (1, 32, 16), (4, 32, 32), (1, 64, 32)])
def test_the_triton_one_has_as_many_columns_as_still_fill_the_chip(n, hv, columns):
    spec = BASE.but(lengths=(500,) * n, padded=(), h=hv, hv=hv, k=128, v=128)
    assert registry.backends(OP)["triton_chunked"].configs(on_gpu(spec))[0]["v_tile"] == columns


def test_sequences_are_cut_where_few_heads_leave_the_chip_idle_for_long():
    cut, chunked = (registry.backends(OP)[name] for name in (CUT[0], CHUNKED))
    long = BASE.but(lengths=(8192,), padded=(), k=128, v=128, h=4, hv=8)
    for spec, pays in (
        (long, True),
        (long.but(lengths=(6000, *[64] * 31)), True),
        (long.but(h=16, hv=64), False),
        (long.but(lengths=(1024,) * 8), False),
        (long.but(lengths=(512,)), False),
        (BASE, False),
    ):
        problem = on_gpu(spec)
        assert (cut.rank(problem) > chunked.rank(problem)) == pays, spec.lengths
        assert cut.check(problem), "it can do them all"


@pytest.mark.parametrize(("arch", "group"), [(80, False), (90, True)])
def test_segments_are_as_many_as_fill_the_chip(arch, group):
    cut = registry.backends(OP)[CUT[1]]
    for hv, segments in ((2, 32), (8, 8), (16, 4), (64, 2)):
        spec = BASE.but(lengths=(8192,), padded=(), k=128, v=128, h=hv // 2, hv=hv, io_dtype="bfloat16")
        config = cut.configs(describe(spec, "cuda", arch))[0]
        assert config["group"] is group
        assert 8192 // config["cut"] == segments
        assert hv * 8192 // config["cut"] * 2 <= 132 or segments == 2


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        (BASE.but(is_kda=True), RejectCode.FEATURE, "KDA"),
        (BASE.but(verify="chain"), RejectCode.FEATURE, "after each of its tokens"),
        (BASE.but(io_dtype="float64"), RejectCode.DTYPE, "q, k, v in float64"),
        (BASE.but(k=512), RejectCode.SHAPE, "up to 256"),
        (BASE.but(k=256, io_dtype="float32"), RejectCode.SHAPE, "does not fit the 227 KiB"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_the_chunked_one_declines_it_says(spec, code, words):
    verdict = registry.backends(OP)[CHUNKED].check(on_gpu(spec))
    assert not verdict
    assert verdict.code is code
    assert words in verdict.reason


@pytest.mark.parametrize("name", GPU)
def test_nothing_of_the_contract_is_declined_on_a_gpu(name):
    backend = registry.backends(OP)[name]
    for spec in CASES["extended"]:
        assert backend.check(on_gpu(spec)), spec.name


def test_on_a_gpu_they_come_before_all_others():
    problem = on_gpu(BASE)
    order = sorted(registry.backends(OP).values(), key=lambda b: -b.rank(problem))
    assert {b.name for b in order[:3]} == set(GPU)


def test_asking_them_imports_no_framework_and_touches_no_device():
    code = f"""
import sys, torch
from isokern import registry
from isokern.registry.ops.fused_sigmoid_gating.cases import BASE
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
before = set(sys.modules)
for name in {GPU}:
    backend = registry.backends({OP!r})[name]
    for problem in (describe(BASE, "cpu"), describe(BASE, "cuda", 90)):
        backend.check(problem) and backend.configs(problem)
    registry.default.fingerprint({OP!r}, name)
    registry.default.dispatcher({OP!r}).decide(describe(BASE, "cpu"), None)
found = {{m.split(".")[0] for m in set(sys.modules) - before}} & set({FRAMEWORKS})
assert not found, found
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestOnTheCpu:
    problem = describe(BASE, "cpu")

    @pytest.mark.parametrize("name", GPU)
    def test_they_decline_by_device(self, name):
        verdict = registry.backends(OP)[name].check(self.problem)
        assert verdict.code is RejectCode.DEVICE
        assert "cpu" in verdict.reason

    def test_explain_says_why(self):
        text = render(registry.default.dispatcher(OP).decide(self.problem, None))
        for name in GPU:
            (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
            assert "rejected [device]" in line
            assert "the tensors are on cpu" in line

    def test_doctor_lists_them(self):
        items = {item.name: item for item in examine(Registry(load_plugins=False)) if item.topic.startswith("backend")}
        for name in GPU:
            assert items[name].state == ("absent" if missing_modules(registry.backends(OP)[name]) else "ok")

    def test_the_tuner_asks_them_nothing_but_their_predicate(self, monkeypatch):
        mine = Registry(load_plugins=False)
        for name in GPU:
            monkeypatch.setattr(type(mine.backends(OP)[name]), "configs", None)
            monkeypatch.setattr(type(mine.backends(OP)[name]), "bind", None)
        admission = admit(mine, OP, self.problem)
        assert not {c.backend for c in admission.candidates} & set(GPU)
        assert {(r.backend, r.code) for r in admission.declined} >= {(name, "device") for name in GPU}


@pytest.mark.parametrize("name", GPU)
class TestWithoutTheFramework:
    def test_the_verdict_is_that_it_is_missing(self, name, monkeypatch):
        mine = Registry(load_plugins=False)
        backend = mine.backends(OP)[name]
        monkeypatch.setattr(type(backend), "requires", ("no_such_framework",))
        verdict = mine.dispatcher(OP).decide(describe(BASE, "cpu"), None).outcome_of(name)
        assert verdict.code is RejectCode.NOT_INSTALLED
        assert "no_such_framework" in verdict.reason

    def test_it_has_a_fingerprint_all_the_same(self, name, monkeypatch):
        there = Registry(load_plugins=False).fingerprint(OP, name)

        def version(distribution):
            raise metadata.PackageNotFoundError(distribution)

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "distributions", list)
        assert Registry(load_plugins=False).fingerprint(OP, name) != there


class TestEngines:
    @pytest.mark.parametrize("name", GPU)
    def test_an_engine_names_the_backend_that_is_registered(self, name):
        info = engine_for(registry.backends(OP)[name])
        assert info is engine_for(name) is ENGINES[name]
        assert info.implementation in BUILTIN_BACKENDS[OP]

    def test_others_have_none(self):
        assert engine_for("torch_reference") is None
        assert engine_for(FunctionBackend(print, OP, "cupy")) is None, "the name alone makes no engine fit"

    @pytest.mark.parametrize("name", GPU)
    def test_their_loaders_are_there(self, name):
        assert callable(load_attribute(ENGINES[name].loader))

    @pytest.mark.parametrize(
        ("name", "missing", "advice"),
        [
            ("cupy", "g++", "package manager"),
            ("triton", "triton", "pip install 'isokern[engines]'"),
            ("numba_cuda", "greenlet", "pip install 'isokern[engines]'"),
        ],
    )
    def test_what_is_missing_is_named_with_how_to_install_it(self, name, missing, advice, monkeypatch):
        monkeypatch.setattr(engines.shutil, "which", lambda program: None)
        found = engines.importlib.util.find_spec
        monkeypatch.setattr(engines.importlib.util, "find_spec", lambda m: None if m == missing else found(m))
        assert ENGINES[name].missing() == (missing,)
        with pytest.raises(MissingEngineError) as raised:
            ENGINES[name].require()
        assert missing in str(raised.value)
        assert advice in str(raised.value)
