"""The Numba CUDA backend without running it: predicate, configs, geometry, parameter blocks."""

from dataclasses import replace

import pytest
import torch

from isokern.backends.numba_cuda.backend import NumbaCuda
from isokern.backends.numba_cuda.parameters import (
    INTEGERS,
    NUMBER_AT,
    NUMBERS,
    POINTERS,
    STRIDE_AT,
    STRIDES,
    inner_strides,
    is_aligned,
    packer,
)
from isokern.backends.numba_cuda.space import configs_for, default_for, every_config
from isokern.backends.numba_cuda.variant import Variant
from isokern.registry.decision import RejectCode
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.cases import CASES
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

QWEN = CaseSpec("qwen", (1,) * 64, h=16, hv=32, k=128, v=128, state_layout="vk")
BACKEND = NumbaCuda()


def on_gpu(spec, arch=90):
    return describe(spec, "cuda", arch)


def call_of(spec):
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.empty_like(call.v)
    return call


@pytest.mark.parametrize("spec", CASES["extended"], ids=lambda s: s.name)
def test_accepts_the_whole_contract(spec):
    assert BACKEND.check(on_gpu(spec))
    assert BACKEND.configs(on_gpu(spec))


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (describe(QWEN, "cpu"), RejectCode.DEVICE),
        (on_gpu(QWEN, arch=75), RejectCode.ARCH),
        (on_gpu(QWEN.but(io_dtype="float64")), RejectCode.DTYPE),
        (on_gpu(QWEN.but(gate_dtype="float64")), RejectCode.DTYPE),
        (on_gpu(QWEN.but(state_dtype="float64")), RejectCode.DTYPE),
        (replace(on_gpu(QWEN), grad=True), RejectCode.GRAD),
        (on_gpu(QWEN.but(k=257)), RejectCode.SHAPE),
        (on_gpu(QWEN.but(v=512)), RejectCode.SHAPE),
    ],
)
def test_declines_nothing_else(problem, code):
    assert BACKEND.check(problem).code is code


@pytest.mark.parametrize("k", [1, 3, 4, 5, 16, 20, 31, 64, 96, 100, 128, 192, 255, 256])
@pytest.mark.parametrize("v", [1, 5, 17, 40, 96, 128, 192, 256])
@pytest.mark.parametrize("kda", [False, True])
def test_configs_fit_the_chip_for_every_size(k, v, kda):
    problem = on_gpu(QWEN.but(lengths=(9, 9), k=k, v=v, is_kda=kda))
    offered = configs_for(problem)
    assert 1 <= len(offered) <= 16
    assert len(set(offered)) == len(offered)
    assert set(offered) <= set(every_config(problem))
    for config in offered:
        variant = Variant.of(problem, config, wide=True)
        assert variant.shared_bytes <= 48 * 1024
        assert variant.columns * variant.per_lane <= 128
        assert variant.padded_k >= k
        assert variant.tile * variant.tiles >= v > variant.tile * (variant.tiles - 1)
        assert variant.window % variant.slots == 0
        assert variant.window <= 32, "a lane per token computes the gates"
        assert not kda or variant.window <= 4 * variant.slots


def test_few_sequences_get_narrow_lanes_and_many_get_wide_ones():
    one = default_for(on_gpu(QWEN.but(lengths=(1,), hv=8, h=4)))
    many = default_for(on_gpu(QWEN.but(lengths=(1,) * 256)))
    assert one["columns"] < many["columns"]
    assert one["resident"] == 1 < many["resident"]


def test_what_a_window_is_staged_for():
    decode, long = on_gpu(QWEN), on_gpu(QWEN.but(lengths=(64,)))
    assert all(config["window"] == 0 for config in configs_for(decode)), "one token is loaded by those who use it"
    assert default_for(on_gpu(QWEN.but(is_kda=True, h=32)))["window"] > 0, "KDA's gates are computed once per block"
    assert default_for(on_gpu(QWEN.but(verify="chain")))["window"] > 0
    assert default_for(on_gpu(QWEN.but(lengths=(4,) * 16)))["window"] == 4, "no longer than the sequences"
    assert default_for(long)["stagers"] > 0 == default_for(on_gpu(QWEN.but(lengths=(64,) * 64)))["stagers"]


def test_only_sequences_of_several_tokens_are_software_pipelined():
    assert not default_for(on_gpu(QWEN))["overlap"]
    assert default_for(on_gpu(QWEN.but(lengths=(4,) * 64)))["overlap"]
    tree = on_gpu(QWEN.but(lengths=(4,) * 64, verify="tree"))
    assert not Variant.of(tree, default_for(tree), wide=True).overlap


def test_one_kernel_serves_any_number_of_heads_of_one_ratio():
    def kernel(h, hv):
        return Variant.of(on_gpu(QWEN.but(h=h, hv=hv)), default_for(on_gpu(QWEN)), wide=True)

    assert kernel(16, 32) == kernel(4, 8) == kernel(1, 2)
    assert kernel(16, 32) != kernel(8, 32)


@pytest.mark.parametrize("strides", ["dense", "rows", "any"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("varlen", [False, True])
def test_a_parameter_block_says_where_every_element_is(strides, layout, varlen):
    spec = CaseSpec("x", (3, 3), strides=strides, state_layout=layout, is_kda=True, varlen=varlen, verify="tree")
    call = call_of(spec)
    problem = replace(call.problem(), device="cuda", arch=90)
    variant = Variant.of(problem, default_for(problem), wide=True)
    block = [0] * INTEGERS
    packer(variant).fill(call, block)
    bytes_of = dict(zip(STRIDES, block[STRIDE_AT:NUMBER_AT], strict=True))
    bytes_of |= {name: value for name, value in inner_strides(variant).items() if value}

    def place(name, tensor, **indices):
        base = block[POINTERS.index({"steps": "intermediates"}.get(name, name))]
        return base + sum(bytes_of[f"{name}_{axis}"] * at for axis, at in indices.items())

    batch, token = (0, 4) if varlen else (1, 1)
    assert place("q", call.q, batch=batch, token=token, head=1, inner=5) == call.q[batch, token, 1, 5].data_ptr()
    assert place("v", call.v, batch=batch, token=token, head=3, inner=7) == call.v[batch, token, 3, 7].data_ptr()
    assert place("a", call.a, batch=batch, token=token, head=2, inner=9) == call.a[batch, token, 2, 9].data_ptr()
    assert place("out", call.out, batch=batch, token=token, head=2, inner=9) == call.out[batch, token, 2, 9].data_ptr()
    assert place("b", call.b, batch=batch, token=token, head=2) == call.b[batch, token, 2].data_ptr()
    assert place("dt_bias", call.dt_bias, head=2, inner=9) == call.dt_bias[2, 9].data_ptr()
    at = (2, 1, 5, 6) if layout == "kv" else (2, 1, 6, 5)
    assert place("pool", call.pool, slot=2, head=1, k=5, v=6) == call.pool[at].data_ptr()
    steps = call.intermediates[1]
    assert place("steps", call.intermediates, row=1, step=2, head=1, k=5, v=6) == steps[at].data_ptr()


def test_index_widths_are_told_per_tensor():
    spec = CaseSpec("x", (3, 3), update="separate", index_dtype="int64", cu_dtype="int32")
    call = call_of(spec)
    call = call.replace(write_slots=call.write_slots.to(torch.int32))
    problem = replace(call.problem(), device="cuda", arch=90)
    block = [0] * INTEGERS
    packer(Variant.of(problem, default_for(problem), wide=True)).fill(call, block)
    first = NUMBER_AT + NUMBERS.index("wide_read")
    assert [bool(x) for x in block[first : first + 3]] == [True, False, False]


def test_states_at_odd_addresses_are_not_accessed_in_vectors():
    spec = CaseSpec("x", (3, 3), k=16, v=16)
    call = call_of(spec)
    storage = torch.zeros(call.pool.numel() + 1)
    shifted = storage[1:].view(call.pool.shape)
    problem = replace(call.problem(), device="cuda", arch=90)
    fill = packer(Variant.of(problem, default_for(problem), wide=True)).fill
    block = [0] * INTEGERS
    fill(call, block)
    assert is_aligned(block)
    fill(call.replace(pool=shifted), block)
    assert not is_aligned(block)
