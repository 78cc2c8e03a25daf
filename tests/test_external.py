"""Adapters to other libraries: what they decline, and that what they do accept is the op, by fakes of the libraries."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isokern import registry
from isokern.backends.external import around, library
from isokern.backends.external.adapter import Adapter
from isokern.backends.external.batch import Spans
from isokern.errors import BackendFailedError
from isokern.registry.backend import Backend
from isokern.registry.conformance.check import Declined
from isokern.registry.conformance.gate import gate
from isokern.registry.conformance.runner import run_checks
from isokern.registry.conformance.subject import Subject
from isokern.registry.decision import RejectCode
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.cases import CASES
from isokern.registry.ops.fused_sigmoid_gating.checks.compare import Recipe
from isokern.registry.ops.fused_sigmoid_gating.checks.slots import accurate_and_untouched
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.plugins import checked
from isokern.tools import external_table

OP = "fused_sigmoid_gating"
_FOUND = importlib.util.spec_from_file_location("external_fakes", Path(__file__).with_name("external_fakes.py"))
external_fakes = importlib.util.module_from_spec(_FOUND)
_FOUND.loader.exec_module(external_fakes)
ADAPTERS = {name: b for name, b in registry.backends(OP).items() if isinstance(b, Adapter)}
VERSION = library._version
#: Those that take any K and V, and those that need 128 and layout vk, bfloat16 gates and so on.
ANY_SHAPE = ("fla_recurrent", "fla_chunk", "sglang_triton", "sglang_chunk")

#: What every adapter takes: its reasons to decline are found by changing one thing of it.
PLAIN = CaseSpec(
    "plain",
    (3, 3),
    h=1,
    hv=2,
    k=128,
    v=128,
    dt_bias_dtype="bfloat16",
    state_layout="vk",
    as_layout=True,
)


@pytest.fixture(autouse=True)
def _whatever_is_installed(monkeypatch):
    """Versions of libraries that happen to be installed here are no matter."""
    monkeypatch.setattr(library, "_version", lambda distribution, package: None)


@pytest.fixture
def fakes(monkeypatch):
    external_fakes.install(monkeypatch)


class OnCpu(Backend):
    """An adapter given CPU tensors: it sees the same problem on an sm_90."""

    def __init__(self, inner, shortcut=False):
        self.inner, self.shortcut = inner, shortcut
        for attribute in ("op", "name", "provenance", "tags", "priority", "accuracy", "exceptions_file"):
            setattr(self, attribute, getattr(inner, attribute))

    def check(self, problem):
        return self.inner.check(replace(problem, device="cuda", arch=90))

    def configs(self, problem):
        problem = replace(problem, device="cuda", arch=90)
        return self.inner.shortcuts(problem) if self.shortcut else self.inner.configs(problem)

    def bind(self, problem, config):
        return self.inner.bind(replace(problem, device="cuda", arch=90), config)


def plain(name):
    """A problem the adapter accepts."""
    one, few = name in ("flashinfer_decode", "sglang_cutedsl"), name == "flashinfer_mtp"
    return PLAIN.but(lengths=(1, 1) if one else (3, 3) if few else (9, 5))


def fitted(spec, name):
    """``spec`` as the adapter can take it, None where the library has no such thing at all."""
    if name not in ("fla_recurrent", "fla_chunk", "flashqla"):
        spec = spec.but(state_layout="vk")
    if name in ANY_SHAPE:
        return spec if name in ("fla_recurrent", "sglang_triton") else spec.but(io_dtype=_half(spec.io_dtype))
    spec = spec.but(k=128, v=128, h=1, hv=2, io_dtype=_half(spec.io_dtype), strides="dense")
    if name in ("flashinfer_decode", "flashinfer_mtp", "sglang_cutedsl"):
        most = 8 if name == "flashinfer_mtp" else 1
        spec = spec.but(lengths=tuple(min(length, most) for length in spec.lengths), gate_dtype="bfloat16")
        spec = spec.but(io_dtype="bfloat16", A_log_dtype="float32", dt_bias_dtype="bfloat16")
    return spec


def _half(dtype):
    return "bfloat16" if dtype == "float32" else dtype


# ---- what is registered


def test_every_adapter_has_a_fake_and_stands_below_isokern_s_own():
    assert set(ADAPTERS) == set(external_fakes.FAKES)
    own = [b.priority for b in registry.backends(OP).values() if not isinstance(b, Adapter)]
    for adapter in ADAPTERS.values():
        assert adapter.priority < min(own)
        assert adapter.provenance == "external"
        module, function, _ = external_fakes.FAKES[adapter.name]
        assert (adapter.library.module, adapter.library.function) == (module, function)


def test_nothing_of_a_library_is_imported_to_decide():
    packages = {a.library.package for a in ADAPTERS.values()}
    for adapter in ADAPTERS.values():
        assert adapter.check(describe(plain(adapter.name), "cuda", 90))
        assert adapter.requires[-1] == adapter.library.package
    assert not packages & set(sys.modules)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_missing_library_is_not_installed(name, monkeypatch):
    adapter = ADAPTERS[name]
    assert adapter.library.package in adapter.requires
    monkeypatch.setattr(type(adapter), "requires", ("torch", "no_such_library"))
    verdict = checked(adapter, describe(plain(name), "cuda", 90))
    assert verdict.code is RejectCode.NOT_INSTALLED
    assert "no_such_library" in verdict.reason


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_library_that_fails_to_import_says_so_in_its_words(name, fakes, monkeypatch):
    adapter = ADAPTERS[name]
    module = sys.modules[adapter.library.module]
    monkeypatch.delattr(module, adapter.library.function)
    problem = describe(plain(name), "cuda", 90)
    with pytest.raises(BackendFailedError, match=f"import failed.*{name}.*{adapter.library.function}"):
        adapter.bind(problem, adapter.configs(problem)[0])


# ---- versions


@pytest.mark.parametrize(
    ("version", "held"),
    [("0.7.1", False), ("0.7.2.post1", True), ("0.7.9", True), ("0.8.0rc1", False), ("nonsense", False)],
)
def test_only_versions_in_range_are_called(version, held, monkeypatch):
    monkeypatch.setattr(library, "_version", lambda distribution, package: version)
    adapter = ADAPTERS["flashinfer_decode"]
    verdict = adapter.check(describe(plain(adapter.name), "cuda", 90))
    assert bool(verdict) is held
    if not held:
        assert verdict.code is RejectCode.NOT_INSTALLED
        assert version in verdict.reason
        assert ">=0.7.2,<0.8" in verdict.reason


def test_a_version_that_nothing_states_is_noted():
    adapter = ADAPTERS["sglang_triton"]
    assert "does not state its version" in adapter.check(describe(plain(adapter.name), "cuda", 90)).note


def test_a_package_without_metadata_states_its_version_in_a_file(tmp_path, monkeypatch):
    package = tmp_path / "stated_by_file"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    (package / "_build_meta.py").write_text('__version__ = "1.2.3"\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "_version", VERSION)
    assert library.Library("x", "stated_by_file", "no-such-distribution", "1", "2", "m", "f").version == "1.2.3"


# ---- what is declined


def changes(spec):
    """Single changes of a plain case: between them they must meet every limit of every adapter."""
    one, long = tuple(1 for _ in spec.lengths), tuple(70 for _ in spec.lengths)
    yield from (
        describe(spec.but(**change), "cuda", 90)
        for change in (
            {"io_dtype": "float32"},
            {"io_dtype": "float16"},
            {"io_dtype": "float64"},
            {"gate_dtype": "float32"},
            {"gate_dtype": "float64"},
            {"A_log_dtype": "bfloat16"},
            {"dt_bias_dtype": "float32"},
            {"dt_bias_dtype": "float16"},
            {"state_dtype": "bfloat16"},
            {"state_dtype": "float16"},
            {"state_layout": "kv"},
            {"is_kda": True},
            {"lower_bound": -5.0},
            {"l2norm": False},
            {"neg_eigval": True},
            {"scale": 0.3},
            {"softplus_beta": 2.0},
            {"update": "separate"},
            {"verify": "chain"},
            {"verify": "tree"},
            {"verify": "chain", "strides": "rows"},
            {"strides": "rows"},
            {"strides": "any"},
            {"k": 64},
            {"v": 264},
            {"lengths": one},
            {"lengths": long},
            {"lengths": (1,) * 70000},
            {"as_layout": False},
        )
    )
    on_gpu = describe(spec, "cuda", 90)
    yield from (replace(on_gpu, arch=80), replace(on_gpu, arch=120), replace(on_gpu, grad=True))


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_limit_is_the_only_one_that_declines_some_problem(name):
    adapter = ADAPTERS[name]
    assert adapter.check(describe(plain(name), "cuda", 90))
    alone = set()
    for problem in changes(plain(name)):
        hit = [limit for limit in adapter.limits if limit.applies(problem)]
        verdict = adapter.check(problem)
        assert bool(verdict) is not bool(hit)
        if len(hit) == 1:
            alone.add(hit[0].reason)
            assert (verdict.code, verdict.reason) == (hit[0].code, hit[0].reason)
    assert alone == {limit.reason for limit in adapter.limits}


def test_inside_a_capture_all_of_them_decline():
    for name, adapter in ADAPTERS.items():
        assert adapter.check(describe(plain(name), "cuda", 90, "graph")).code is RejectCode.MODE


def test_on_the_cpu_all_of_them_decline():
    for adapter in ADAPTERS.values():
        assert adapter.check(describe(PLAIN, "cpu")).code is RejectCode.DEVICE


def test_the_document_says_what_is_called_and_declined():
    text = (Path(library.__file__).parents[2] / "docs" / "external.md").read_text()
    assert external_table.external() in text, "run tools/tables.py"
    for name in ADAPTERS:
        assert f"`{name}`" in text


# ---- what is accepted is the op


@pytest.mark.parametrize("name", ["fla_recurrent", "sglang_triton"])
def test_fast_checks_of_the_suite(name, fakes):
    report = run_checks(OP, OnCpu(ADAPTERS[name]), peers=())
    assert not report.failures, [f"{f.check} {f.case}: {f.message}" for f in report.failures]
    assert any(f.status.value == "pass" for f in report.findings)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_list_of_cases_as_far_as_each_library_goes(name, fakes):
    subject = Subject(OnCpu(ADAPTERS[name]), device="cpu")
    passed = set()
    for spec in dict.fromkeys(fitted(spec, name) for spec in CASES["core"]):
        try:
            accurate_and_untouched(subject, Recipe(spec))
        except Declined:
            continue
        passed.add(spec.name)
    expected = {"mixed", "batch", "stateless", "one long, many short", "read only"}
    if name != "flashinfer_mtp":
        expected |= {"decode", "all empty"}
    if name != "sglang_triton":
        expected.add("separate slots")
    assert expected <= passed


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_config_passes_the_tuner_s_gate(name, fakes):
    spec = plain(name).but(lengths=(1, 1, 1) if plain(name).lengths == (1, 1) else (7, 6, 8))
    adapter = ADAPTERS[name]
    for config in adapter.configs(describe(spec, "cuda", 90)):
        result = gate(OP, OnCpu(adapter), config, spec)
        assert result.ok, (config.label, result.reason)


@pytest.mark.parametrize("name", [n for n, a in ADAPTERS.items() if a.shortcuts(describe(plain(n), "cuda", 90))])
def test_shortcuts_are_right_where_every_slot_is_valid_and_not_offered(name, fakes):
    adapter, spec = ADAPTERS[name], plain(name)
    problem = describe(spec, "cuda", 90)
    assert not set(adapter.shortcuts(problem)) & set(adapter.configs(problem))
    assert not adapter.shortcuts(describe(spec.but(update="disabled"), "cuda", 90))
    accurate_and_untouched(Subject(OnCpu(adapter, shortcut=True), device="cpu"), Recipe(spec))
    padded = gate(OP, OnCpu(adapter, shortcut=True), adapter.shortcuts(problem)[0], spec.but(padded=(1,)))
    assert not padded.ok


@pytest.mark.parametrize("name", ADAPTERS)
def test_without_out_the_library_s_own_tensor_comes_back(name, fakes):
    call = canonical_call(**make_inputs(plain(name)).kwargs)
    ref = reference(call)
    problem = replace(call.problem(), device="cuda", arch=90)
    out = ADAPTERS[name].bind(problem, ADAPTERS[name].configs(problem)[0])(call)
    assert call.out is None
    assert out.shape == call.v.shape
    assert judge(call, out, ref).ok


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_call_that_the_library_refuses_names_backend_and_problem(name, fakes, monkeypatch):
    adapter = ADAPTERS[name]

    def refuse(*args, **kwargs):
        raise AssertionError("K must be at least 128")

    monkeypatch.setattr(sys.modules[adapter.library.module], adapter.library.function, refuse)
    problem = describe(plain(name), "cuda", 90)
    run = adapter.bind(problem, adapter.configs(problem)[0])
    call = canonical_call(**make_inputs(plain(name)).kwargs)
    with pytest.raises(BackendFailedError, match=f"run failed.*{name}.*K must be at least 128"):
        run(call)


# ---- what is done around the libraries


def test_spans_leave_empty_sequences_out():
    spans = Spans.of((0, 0, 3, 3, 5), torch.device("cpu"))
    assert spans.lengths == (3, 2)
    assert spans.live.tolist() == [1, 3]
    assert spans.cu.tolist() == spans.cu_cpu.tolist() == [0, 3, 5]
    rows, inside, back = spans.padding()
    assert rows[inside].tolist() == [0, 1, 2, 3, 4]
    assert inside.tolist() == [True, True, True, True, True, False]
    assert back.tolist() == [0, 1, 2, 3, 4]
    assert not spans.equal
    assert Spans.of((0, 2, 4), torch.device("cpu")).live is None


def test_states_of_negative_slots_are_zero_and_stored_nowhere():
    pool = torch.arange(24.0).view(3, 2, 2, 2)
    before, slots = pool.clone(), torch.tensor([2, -1, 0])
    states = around.gather_states(pool, slots)
    assert torch.equal(states[0], pool[2])
    assert not states[1].any()
    around.scatter_states(torch.full_like(states, math.pi), pool, slots, torch.tensor([0, 1, 2, 2]))
    assert bool((pool[2] == torch.tensor(math.pi)).all())
    assert torch.equal(pool[:2], before[:2])  # slot 0 belongs to an empty sequence
