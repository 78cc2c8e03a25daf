"""numba_cpu pinned to a kind of call: the same bits as the call itself, whatever the contents and the threads."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from isokern import registry
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

BASE = CaseSpec("base", (3, 0, 5, 1), h=2, hv=4, k=24, v=40, extra_rows=2)
SPECS = {
    "in place": BASE,
    "strided, vk": BASE.but(strides="any", state_layout="vk", state_dtype="bfloat16"),
    "kda, bounded": BASE.but(is_kda=True, lower_bound=-5.0, neg_eigval=True, l2norm=False),
    "tree, separate": BASE.but(verify="tree", update="separate", index_dtype="int64", fresh=(0,)),
    "read only": BASE.but(update="disabled", scale=0.3, softplus_beta=2.0),
    "batch, no pool": BASE.but(varlen=False, lengths=(3, 3), state_dtype=None, extra_rows=0),
}


def call_of(spec, seed):
    inputs = make_inputs(spec, seed)
    call = canonical_call(**inputs.kwargs)
    call.out = torch.full(call.v.shape, 7.0, dtype=call.q.dtype)
    return inputs, call


def runner_of(call):
    backend = registry.backends(SPEC.name)["numba_cpu"]
    return backend.bind(call.problem(), backend.configs(call.problem())[0])


def tensors_of(call):
    return tuple(getattr(call, name) for name in TENSORS)


@pytest.mark.parametrize("name", SPECS)
def test_the_bits_of_the_call_itself(name):
    spec = SPECS[name]
    _, first = call_of(spec, 0)
    runner = runner_of(first)
    pinned = runner.pin(first)
    before = torch.get_num_threads()
    try:
        for seed, threads in ((0, 1), (1, 2), (2, 1)):
            torch.set_num_threads(threads)
            (one, plain), (two, other) = call_of(spec, seed), call_of(spec, seed)
            runner(plain)
            assert pinned(tensors_of(other)) is None
            assert torch.equal(plain.out, other.out)
            for x, y in ((one.pool_storage, two.pool_storage), (one.intermediate_storage, two.intermediate_storage)):
                assert x is None or torch.equal(x, y)
    finally:
        torch.set_num_threads(before)


def test_the_tensors_it_was_made_from_are_not_kept_alive():
    inputs, call = call_of(BASE, 0)
    pinned = runner_of(call).pin(call)
    pinned(tensors_of(call))
    watched = weakref.ref(call.v), weakref.ref(inputs.pool_storage)
    del inputs, call
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    _, other = call_of(BASE, 0)
    pinned(tensors_of(other))


def test_threads_share_no_block():
    _, first = call_of(BASE, 0)
    pinned = runner_of(first).pin(first)
    calls = [call_of(BASE, seed) for seed in (1, 2)]
    expected = []
    for seed in (1, 2):
        _, call = call_of(BASE.but(update="disabled"), seed)
        runner_of(call)(call)
        expected.append(call.out)
    wrong = []

    def work(which):
        inputs, call = calls[which]
        start = inputs.pool_storage.clone()
        for _ in range(100):
            inputs.pool_storage.copy_(start)
            pinned(tensors_of(call))
            if not torch.equal(call.out[:, :9], expected[which][:, :9]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
