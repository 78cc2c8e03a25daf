"""The Numba CUDA kernel, executed on a CPU by its engine: values, equal bits whatever the config, planted faults."""

from contextlib import contextmanager

import pytest
import torch

from isokern.backends.numba_cuda import places
from isokern.backends.numba_cuda.space import every_config
from isokern.engines.numba_simulator.engine import NumbaSimulator, SimulatedNumbaCuda
from isokern.engines.numba_simulator.fibers import SCHEDULES
from isokern.engines.numba_simulator.simulator import Simulator
from isokern.registry.conformance.check import Violation
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

pytestmark = pytest.mark.engine("numba_simulator")
#: Small, K and V no powers of two, more tokens than a window holds, an empty and a padded sequence.
SMALL = CaseSpec("small", (11, 0, 2, 1), padded=(2,), h=1, hv=2, k=20, v=12)


@pytest.fixture(scope="module")
def engine():
    return NumbaSimulator()


def call_of(spec):
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype)
    return call


def run(engine, spec, config=None):
    """What a run leaves: output, pool, buffer."""
    backend, call = SimulatedNumbaCuda(engine), call_of(spec)
    problem = call.problem()
    out = backend.bind(problem, config or backend.configs(problem)[0])(call)
    return call, out


def left(call):
    return [t.clone().nan_to_num() for t in (call.out, call.pool, call.intermediates) if t is not None]


def equal(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        SMALL.but(name="float32", io_dtype="float32", gate_dtype="float32"),
        SMALL.but(name="kda, vk, bfloat16 pool", is_kda=True, state_layout="vk", state_dtype="bfloat16"),
        SMALL.but(name="bounded, float16", is_kda=True, lower_bound=-5.0, io_dtype="float16", state_dtype="float16"),
        SMALL.but(name="tree", lengths=(6, 0, 3, 1), verify="tree", intermediate_dtype="bfloat16"),
        SMALL.but(name="chain, read only", lengths=(6, 3), padded=(1,), verify="chain", update="disabled"),
        SMALL.but(name="fresh", update="separate", fresh=(0,), index_dtype="int64", cu_dtype="int64"),
        SMALL.but(name="strided, no norm", strides="any", l2norm=False, neg_eigval=True, state_layout="vk"),
        SMALL.but(name="rows", strides="rows", extra_rows=2, scale=0.3, softplus_beta=0.7, softplus_threshold=5.0),
        SMALL.but(name="batch, stateless", varlen=False, lengths=(3, 3), padded=(), state_dtype=None),
        SMALL.but(name="K=1 V=1", k=1, v=1),
        SMALL.but(name="odd", k=31, v=7, state_layout="vk"),
    ],
    ids=lambda s: s.name,
)
def test_values_are_within_the_bound(engine, spec):
    ref = reference(call_of(spec))
    call, out = run(engine, spec)
    assert judge(call, out, ref).faults == ()


@pytest.mark.parametrize("spec", [SMALL, SMALL.but(name="kda", is_kda=True, k=40)], ids=lambda s: s.name)
def test_no_config_changes_a_bit(engine, spec):
    want = left(run(engine, spec)[0])
    offered = every_config(describe(spec, "cuda", 90))
    assert {c["lanes"] for c in offered} >= {4, 8}
    assert {c["columns"] for c in offered} >= {1, 2, 4}
    assert {c["stagers"] for c in offered} == {0, 4}
    for config in offered[::19]:
        assert equal(left(run(engine, spec, config)[0]), want), config.label


@pytest.mark.parametrize("lengths", [(1,) * 5, (2, 1, 3, 1, 2)], ids=["decode", "staged"])
def test_sequences_beyond_the_grids_y_axis_go_on_along_z(engine, lengths, monkeypatch):
    """Two layers of two and one that is half full, in which nothing outside the tensors may be touched."""
    spec = SMALL.but(lengths=lengths, padded=(1,), k=8)
    want = left(run(engine, spec)[0])
    monkeypatch.setattr(places, "_MOST_Y", 2)
    grids = []
    launch = engine.launch
    monkeypatch.setattr(engine, "launch", lambda kernel, grid, *rest: grids.append(grid) or launch(kernel, grid, *rest))
    backend, call = SimulatedNumbaCuda(engine), call_of(spec)
    problem = call.problem()
    with watched(engine, call):
        backend.bind(problem, backend.configs(problem)[0])(call)
    assert [grid[1:] for grid in grids] == [(2, 3)]
    assert equal(left(call), want)


@pytest.mark.parametrize("state_layout", ["kv", "vk"])
@pytest.mark.parametrize("io_dtype", ["bfloat16", "float32"])
def test_a_token_alone_has_the_bits_of_a_token_among_others(engine, state_layout, io_dtype):
    """Decodes take a kernel of their own, and one call's decode is another call's short sequence."""
    spec = SMALL.but(state_layout=state_layout, io_dtype=io_dtype, k=24, lengths=(3, 0, 1, 1))
    staged = every_config(describe(spec, "cuda", 90))[0]
    assert staged["window"] > 0
    want = left(run(engine, spec, staged)[0])
    for config in every_config(describe(spec.but(lengths=(1,)), "cuda", 90))[::29]:
        assert config["window"] == 0
        assert equal(left(run(engine, spec, config)[0]), want), config.label


@pytest.mark.parametrize("lengths", [(1, 1), (5, 2)], ids=["decode", "staged"])
def test_rows_at_odd_addresses_are_loaded_element_by_element(engine, lengths):
    spec = SMALL.but(lengths=lengths, padded=(), k=24)
    want = left(run(engine, spec)[0])
    call = call_of(spec)
    storage = torch.zeros(call.k.numel() + 1, dtype=call.k.dtype)
    odd = storage[1:].view(call.k.shape)
    odd.copy_(call.k)
    call = call.replace(k=odd)
    backend, problem = SimulatedNumbaCuda(engine), call.problem()
    with watched(engine, call):
        backend.bind(problem, backend.configs(problem)[0])(call)
    assert equal(left(call), want)


def test_vectors_and_single_elements_move_the_same_states(engine):
    spec = SMALL.but(state_dtype="bfloat16", k=16, v=16)
    want = left(run(engine, spec)[0])
    call = call_of(spec)
    storage = torch.zeros(call.pool.numel() + 1, dtype=call.pool.dtype)
    odd = storage[1:].view(call.pool.shape)
    odd.copy_(call.pool)
    call = call.replace(pool=odd)
    backend, problem = SimulatedNumbaCuda(engine), call.problem()
    backend.bind(problem, backend.configs(problem)[0])(call)
    assert equal(left(call), want)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_no_schedule_changes_a_bit(engine, schedule):
    want = left(run(engine, SMALL)[0])
    with engine.scheduled(schedule):
        assert equal(left(run(engine, SMALL)[0]), want)


def test_without_its_barrier_the_kernel_is_caught(engine, monkeypatch):
    want = left(run(engine, SMALL)[0])
    monkeypatch.setattr(Simulator, "syncthreads", lambda self: None)
    caught = 0
    for schedule in SCHEDULES:
        with engine.scheduled(schedule):
            caught += not equal(left(run(engine, SMALL)[0]), want)
    assert caught >= 2


@contextmanager
def watched(engine, call, **replaced):
    with engine.watch_addresses({**call.tensors(), **replaced}):
        yield


def test_every_access_is_inside_the_tensors(engine):
    backend = SimulatedNumbaCuda(engine)
    for spec in (SMALL, SMALL.but(strides="any"), SMALL.but(verify="tree", lengths=(4, 2), padded=())):
        call = call_of(spec)
        problem = call.problem()
        with watched(engine, call):
            backend.bind(problem, backend.configs(problem)[0])(call)


def test_a_slot_beyond_the_pool_is_caught(engine):
    call = call_of(SMALL)
    backend, problem = SimulatedNumbaCuda(engine), call.problem()
    with watched(engine, call, pool=call.pool[:1]), pytest.raises(Violation, match="outside every tensor"):
        backend.bind(problem, backend.configs(problem)[0])(call)


def test_two_sequences_on_one_slot_are_a_race(engine):
    call = call_of(SMALL.but(lengths=(2, 2), padded=()))
    call.read_slots[:] = 0
    backend, problem = SimulatedNumbaCuda(engine), call.problem()
    with watched(engine, call), pytest.raises(Violation, match="blocks"):
        backend.bind(problem, backend.configs(problem)[0])(call)


def test_nothing_to_do_launches_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine, "launch", None)
    for spec in (SMALL.but(lengths=(), padded=()), SMALL.but(lengths=(0, 0), padded=())):
        run(engine, spec)
