"""The CUDA C++ kernel on a CPU: right on the whole contract, the same bits in every config, nothing else touched."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from isokern.backends.cupy.arguments import ARGUMENT_BYTES
from isokern.backends.cupy.backend import Cupy
from isokern.backends.cupy.compiling import FOLDER, source
from isokern.backends.cupy.specialization import Specialization, landing_bytes, stage_bytes
from isokern.engines.cuda_on_cpu.backend import CupyOnCpu
from isokern.engines.cuda_on_cpu.engine import CudaOnCpu
from isokern.engines.cuda_on_cpu.raw_kernel import CpuRawKernel
from isokern.registry.backend import Config
from isokern.registry.conformance.runner import run_checks
from isokern.registry.decision import Accepted, RejectCode
from isokern.registry.ops.fused_sigmoid_gating.call import Call
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.problem import Problem
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

BACKEND = CupyOnCpu()
BASE = CaseSpec("mixed", (9, 0, 20, 1, 5), padded=(4,))


def call_of(spec: CaseSpec) -> Call:
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype)
    return call


def run(call: Call, config: Config | None = None) -> Call:
    problem = call.problem()
    BACKEND.bind(problem, config or BACKEND.configs(problem)[0])(call)
    return call


def problem_of(spec: CaseSpec) -> Problem:
    return replace(call_of(spec).problem(), device="cuda", arch=90)


def left(call: Call) -> list[torch.Tensor]:
    return [t.clone() for t in (call.out, call.pool, call.intermediates) if t is not None]


CONTRACT = [
    BASE,
    BASE.but(name="vk, bf16 pool", state_layout="vk", state_dtype="bfloat16"),
    BASE.but(name="float32", io_dtype="float32", gate_dtype="float32"),
    BASE.but(name="kda bounded", is_kda=True, lower_bound=-5.0, neg_eigval=True),
    BASE.but(name="kda, float64 gates", is_kda=True, gate_dtype="float64", A_log_dtype="float64"),
    BASE.but(name="mixed gates", A_log_dtype="float16", dt_bias_dtype="bfloat16", gate_dtype="float64"),
    BASE.but(name="no norm, float16", l2norm=False, io_dtype="float16", state_dtype="float16", scale=0.3),
    BASE.but(name="softplus", softplus_beta=0.7, softplus_threshold=3.0, distribution="extreme"),
    BASE.but(name="strided", strides="any", extra_rows=3, state_layout="vk", is_kda=True),
    BASE.but(name="rows, separate", strides="rows", extra_rows=3, update="separate", fresh=(0,)),
    BASE.but(name="batch, int64", varlen=False, lengths=(3, 3, 3), padded=(1,), index_dtype="int64"),
    BASE.but(name="tree", lengths=(5, 0, 8, 1), padded=(3,), verify="tree"),
    BASE.but(name="tree, bf16 buffer, kda", lengths=(5, 8), padded=(), verify="tree", intermediate_dtype="bfloat16"),
    BASE.but(name="chain, fp16 buffer", lengths=(5, 8), padded=(), verify="chain", intermediate_dtype="float16"),
    BASE.but(name="stateless, verified", state_dtype=None, padded=(), lengths=(4, 2), verify="tree"),
    BASE.but(name="K=1 V=5", k=1, v=5),
    BASE.but(name="K=5 V=1", k=5, v=1),
    BASE.but(name="K=31 V=17 vk", k=31, v=17, state_layout="vk"),
    BASE.but(name="K=96 V=192", k=96, v=192, lengths=(3, 2), padded=(), hv=6),
    BASE.but(name="K=V=256 kda", k=256, v=256, lengths=(2, 1), padded=(), h=1, hv=1, is_kda=True),
]


@pytest.mark.parametrize("spec", CONTRACT, ids=lambda spec: spec.name)
def test_every_argument_is_honoured_within_the_error_bound(spec):
    assert BACKEND.check(call_of(spec).problem()) == Accepted()
    call = call_of(spec)
    exact = reference(call)
    judgement = judge(run(call), call.out, exact)
    assert judgement.ok, judgement.faults


DECODE = BASE.but(name="decode", lengths=(1, 0, 1, 1), padded=(3,), k=128, v=128)
BITS = [
    BASE.but(name="gdn", k=128, v=128),
    BASE.but(name="kda vk, bf16 pool", is_kda=True, k=96, v=64, state_layout="vk", state_dtype="bfloat16"),
    BASE.but(name="short tree vk", lengths=(5, 0, 8, 1), padded=(3,), k=64, v=64, verify="tree", state_layout="vk"),
    DECODE.but(name="decode kv"),
    DECODE.but(name="decode vk, bf16 pool", state_dtype="bfloat16", state_layout="vk"),
]


@pytest.mark.parametrize("spec", BITS, ids=lambda spec: spec.name)
def test_all_configs_give_the_same_bits(spec):
    configs = BACKEND.configs(call_of(spec).problem())
    assert len(configs) > 8
    first, *others = (left(run(call_of(spec), config)) for config in configs)
    for config, got in zip(configs[1:], others, strict=True):
        for x, y in zip(got, first, strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), config.label


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_both_layouts_give_the_same_bits(state):
    spec = BASE.but(name="layouts", k=64, v=64, state_dtype=state)
    kv, vk = call_of(spec), call_of(spec)
    vk = vk.replace(pool=vk.pool.transpose(-1, -2).contiguous(), state_layout="vk")
    run(kv)
    run(vk)
    assert torch.equal(kv.out, vk.out)
    assert torch.equal(kv.pool, vk.pool.transpose(-1, -2))


UNALIGNED = [
    BASE,
    BASE.but(name="kda", is_kda=True, state_layout="vk"),
    DECODE,
    DECODE.but(name="decode vk, bf16 pool", state_dtype="bfloat16", state_layout="vk"),
]


@pytest.mark.parametrize("spec", UNALIGNED, ids=lambda spec: spec.name)
def test_unaligned_tensors_take_narrow_loads_and_give_the_same_bits(spec):
    whole, odd = call_of(spec), call_of(spec)
    for name in ("q", "k", "v", "a"):
        given = getattr(odd, name)
        shifted = torch.zeros(given.numel() + 1, dtype=given.dtype)[1:].view(given.shape)
        setattr(odd, name, shifted.copy_(given))
    pool = torch.zeros(odd.pool.shape[0], odd.pool[0].numel() + 1, dtype=odd.pool.dtype)[:, 1:].unflatten(
        1, odd.pool.shape[1:]
    )
    odd.pool = pool.copy_(odd.pool)
    assert odd.problem().strides == "rows"
    for x, y in zip(left(run(odd)), left(run(whole)), strict=True):
        assert torch.equal(x, y)


def test_more_sequences_than_a_grid_axis_holds():
    n = 65537
    spec = CaseSpec("many", (1,) * n, h=1, hv=1, k=4, v=1, extra_slots=0, io_dtype="float32", gate_dtype="float32")
    call = call_of(spec)
    start = call.pool.clone()
    run(call)
    assert not bool(torch.isnan(call.out).any())
    for i in (65534, 65535, 65536):
        row = {name: getattr(call, name)[:, i : i + 1] for name in ("q", "k", "v", "a", "b")}
        alone = call.replace(
            **row,
            pool=start.clone(),
            read_slots=call.read_slots[i : i + 1],
            cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
            out=torch.zeros_like(row["v"]),
        )
        assert torch.equal(run(alone).out, call.out[:, i : i + 1])


class TestPredicate:
    @pytest.mark.parametrize("spec", CONTRACT, ids=lambda spec: spec.name)
    def test_accepts_the_whole_contract_on_a_gpu(self, spec):
        assert Cupy().check(problem_of(spec)) == Accepted()

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"device": "cpu"}, RejectCode.DEVICE),
            ({"arch": 75}, RejectCode.ARCH),
            ({"io_dtype": "float64"}, RejectCode.DTYPE),
            ({"state_dtype": "float64"}, RejectCode.DTYPE),
            ({"grad": True}, RejectCode.GRAD),
            ({"k": 257}, RejectCode.SHAPE),
            ({"v": 257}, RejectCode.SHAPE),
        ],
    )
    def test_declines_with_a_reason(self, changes, code):
        verdict = Cupy().check(replace(problem_of(BASE), **changes))
        assert not verdict
        assert verdict.code is code

    def test_the_engine_takes_cpu_tensors_only(self):
        assert BACKEND.check(problem_of(BASE)).code is RejectCode.DEVICE


class TestConfigs:
    @pytest.mark.parametrize("k", [1, 5, 64, 96, 128, 256])
    @pytest.mark.parametrize("v", [1, 40, 128, 256])
    @pytest.mark.parametrize("kda", [False, True])
    @pytest.mark.parametrize("state", ["float32", "bfloat16"])
    def test_something_fits_every_shape_and_nothing_exceeds_a_block(self, k, v, kda, state):
        for lengths in ((1,), (5,)):
            spec = CaseSpec("shape", lengths, h=1, hv=1, k=k, v=v, is_kda=kda, state_dtype=state)
            for config in Cupy().configs(problem_of(spec)):
                vector = 4 if state == "float32" else 8
                shared = stage_bytes(k, config, kda, vector) if config["staged"] else landing_bytes(k, config, vector)
                assert config["staged"] or not kda
                assert shared <= 48 << 10 or not (config["staged"] or config["landing"])

    def test_each_config_is_offered_once(self):
        configs = Cupy().configs(problem_of(BASE.but(k=128, v=128)))
        assert len(set(configs)) == len(configs)


def test_python_and_cpp_agree_on_the_argument():
    body = "\n".join((FOLDER / name).read_text() for name in ("numbers.cuh", "arguments.cuh"))
    out = torch.zeros(1, dtype=torch.int64)
    CpuRawKernel(
        body.replace("#pragma once", "")
        + '\nextern "C" __global__ void size(long long* out) { *out = sizeof(Arguments); }',
        "size",
    )((1,), (1,), (out,))
    assert out.item() == ARGUMENT_BYTES


def test_the_source_is_one_text():
    assert "#include" not in source()
    assert 'extern "C" __global__' in source()


def test_a_specialisation_names_every_macro_once():
    options = Specialization.of(problem_of(BASE), Cupy().configs(problem_of(BASE))[0]).options()
    names = [option.split("=")[0] for option in options]
    assert len(set(names)) == len(names) == len(fields(Specialization))


def test_the_suite_finds_nothing_and_the_engine_watches():
    checks = ["N5", "N8", "M2", "M3", "M9", "S2", "S4E", "S5E", "S7", "C2", "C5", "C7"]
    report = run_checks(
        "fused_sigmoid_gating", BACKEND, only=checks, device="cpu", engine=CudaOnCpu(), peers=(), fail_fast=True
    )
    assert report.ok, [f for f in report.findings if f.status.value in ("fail", "error")]
    assert {f.check for f in report.findings} == set(checks)
