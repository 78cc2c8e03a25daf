"""The engine that runs Numba CUDA kernels on a CPU: threads, barriers, warp operations, memory. Its own self-test."""

import numpy as np
import pytest
import torch

from isokern.engines.numba_simulator.fibers import SCHEDULES, BlockFault, Schedule
from isokern.engines.numba_simulator.memory import CheckedMemory
from isokern.engines.numba_simulator.simulator import Simulator
from isokern.registry.conformance.check import Violation

pytestmark = pytest.mark.engine("numba_simulator")
LOCKSTEP = Schedule("lockstep")
EVERY = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)


def launch(kernel, threads, *args, schedule=LOCKSTEP, grid=(1, 1, 1)):
    """Run ``kernel(cuda, *args)``; ``cuda`` is what the name means inside a kernel."""
    simulator = Simulator(schedule)
    simulator.launch(lambda *given: kernel(simulator, *given), grid, threads, args)


@EVERY
def test_shuffles_move_values_between_lanes(schedule):
    got = np.zeros((4, 64), int)

    def kernel(cuda, out):
        t = cuda.threadIdx.x
        out[0, t] = cuda.shfl_xor_sync(0xFFFFFFFF, t, 5)
        out[1, t] = cuda.shfl_sync(0xFFFFFFFF, t, 3)
        out[2, t] = cuda.shfl_up_sync(0xFFFFFFFF, t, 2)
        out[3, t] = cuda.shfl_down_sync(0xFFFFFFFF, t, 2)

    launch(kernel, 64, got, schedule=schedule)
    t = np.arange(64)
    warp, lane = t // 32 * 32, t % 32
    assert (got[0] == warp + (lane ^ 5)).all()
    assert (got[1] == warp + 3).all()
    assert (got[2] == np.where(lane >= 2, t - 2, t)).all()
    assert (got[3] == np.where(lane < 30, t + 2, t)).all()


@EVERY
def test_ballots_and_shuffles_of_part_of_a_warp(schedule):
    got = np.zeros(32, int)

    def kernel(cuda, out):
        t = cuda.threadIdx.x
        if t < 8:
            out[t] = cuda.ballot_sync(0xFF, t % 2 == 0)
        else:
            out[t] = cuda.shfl_xor_sync(0xFFFFFF00, t, 1)

    launch(kernel, 32, got, schedule=schedule)
    assert (got[:8] == 0b01010101).all()
    assert (got[8:] == (np.arange(8, 32) ^ 1)).all()


@EVERY
def test_a_barrier_orders_shared_memory(schedule):
    got = np.zeros(96)

    def kernel(cuda, out):
        t = cuda.threadIdx.x
        shared = cuda.shared.array(96, np.float32)
        shared[t] = t
        cuda.syncthreads()
        out[t] = shared[95 - t]

    launch(kernel, 96, got, schedule=schedule)
    assert (got == 95 - np.arange(96)).all()


def test_a_missing_barrier_shows_when_a_warp_runs_ahead():
    def kernel(cuda, out):
        t = cuda.threadIdx.x
        shared = cuda.shared.array(64, np.float32)
        shared[t] = t
        cuda.syncwarp()
        out[t] = shared[63 - t]

    wrong = 0
    for schedule in SCHEDULES:
        got = np.zeros(64)
        launch(kernel, 64, got, schedule=schedule)
        wrong += np.isnan(got).any()
    assert wrong >= 4, "memory nobody wrote must be read under most orders"


def test_shared_and_local_memory_start_poisoned_in_every_block():
    seen = []

    def kernel(cuda):
        shared, local = cuda.shared.array(4, np.float32), cuda.local.array(2, np.float32)
        seen.append(np.isnan(shared).all() and np.isnan(local).all())
        shared[:] = 1
        local[:] = 1

    launch(kernel, 1, grid=(3, 1, 1))
    assert seen == [True] * 3


def test_blocks_are_counted_along_x_then_y_then_z():
    seen, numbers = [], []
    simulator = Simulator(LOCKSTEP)

    def kernel():
        block, grid = simulator.blockIdx, simulator.gridDim
        assert (grid.x, grid.y, grid.z) == (2, 3, 2)
        seen.append((block.z * grid.y + block.y) * grid.x + block.x)

    simulator.launch(kernel, (2, 3, 2), 1, (), numbers.append)
    assert seen == numbers == list(range(12))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda cuda, t: cuda.syncthreads() if t < 32 else None, "divergent barrier"),
        (lambda cuda, t: cuda.syncwarp() if t % 32 < 16 else cuda.syncthreads(), "divergent barrier"),
        (lambda cuda, t: cuda.shfl_xor_sync(0xFFFFFFFF, t, 1) if t % 32 else None, "returned or never were"),
        (lambda cuda, t: cuda.shfl_xor_sync(0xF0, t, 1), "does not name it"),
        (lambda cuda, t: cuda.syncwarp() if t % 2 else cuda.shfl_sync(0xFFFFFFFF, t, 0), "different operations"),
    ],
)
def test_what_hardware_hangs_on_is_told(body, message):
    with pytest.raises(BlockFault, match=message):
        launch(lambda cuda: body(cuda, cuda.threadIdx.x), 64)


def test_a_thread_that_raises_is_named():
    def kernel(cuda):
        if cuda.threadIdx.x == 40:
            raise ValueError("here")

    with pytest.raises(ValueError, match="here") as raised:
        launch(kernel, 64)
    assert raised.value.__notes__ == ["in thread 40 (warp 1, lane 8)"]


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_values_are_stored_as_the_format_rounds_them(dtype, torch_dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=generator, dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, torch.tensor([0.0, -0.0, float("inf"), 3.4e38, 65519.9, 65520.0, 1e-45, 2.0**-25])])
    memory, stored = CheckedMemory(), torch.zeros(len(values), dtype=torch_dtype)
    store, load = memory.store(dtype), memory.load(dtype)
    back = []
    with np.errstate(over="ignore"):
        for i, value in enumerate(values.numpy()):
            store(stored.data_ptr() + 2 * i, value)
            back.append(load(stored.data_ptr() + 2 * i))
    assert torch.equal(stored.isnan(), values.isnan())
    wanted = values.to(torch_dtype)
    assert torch.equal(stored.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(torch.tensor(np.array(back)).nan_to_num(), wanted.float().nan_to_num())


def test_vectors_are_the_elements_in_order():
    memory = CheckedMemory()
    for dtype, torch_dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        source, target = torch.arange(8, dtype=torch_dtype), torch.zeros(8, dtype=torch_dtype)
        for n in (2, 4, 8):
            memory.store_vector(dtype, n)(target.data_ptr(), memory.load_vector(dtype, n)(source.data_ptr()))
            assert torch.equal(target[:n], source[:n])


def test_an_access_outside_the_tensors_is_a_violation():
    memory, inside = CheckedMemory(), torch.zeros(16)
    load, at = memory.load("float32"), inside[4:12]
    with memory.watching({"x": at}):
        load(at.data_ptr())
        load(at.data_ptr() + 28)
        for outside in (at.data_ptr() - 4, at.data_ptr() + 32):
            with pytest.raises(Violation, match="outside every tensor"):
                load(outside)
    load(at.data_ptr() - 4)  # nobody watches any more


def test_the_gaps_of_a_strided_tensor_are_outside():
    memory, wide = CheckedMemory(), torch.zeros(16)
    every_other = wide[::2]
    with memory.watching({"x": every_other}):
        memory.load("float32")(every_other.data_ptr() + 8)
        with pytest.raises(Violation, match="outside every tensor"):
            memory.load("float32")(every_other.data_ptr() + 4)
        with pytest.raises(Violation, match="outside every tensor"):
            memory.load_vector("float32", 4)(every_other.data_ptr())


def test_misaligned_vectors_are_violations():
    memory, x = CheckedMemory(), torch.zeros(16)
    with pytest.raises(Violation, match="misaligned"):
        memory.load_vector("float32", 4)(x.data_ptr() + 4)


@pytest.mark.parametrize("first", ["load", "store"])
def test_two_blocks_on_one_place_are_a_race_unless_both_only_read(first):
    memory, x = CheckedMemory(), torch.zeros(4)
    load, store = memory.load("float32"), memory.store("float32")
    with memory.watching({"x": x}):
        memory.launched()
        memory.block = 0
        load(x.data_ptr())
        store(x.data_ptr() + 8, np.float32(1))
        memory.block = 1
        load(x.data_ptr())
        if first == "load":
            with pytest.raises(Violation, match="which block 0 reads"):
                store(x.data_ptr(), np.float32(1))
        else:
            with pytest.raises(Violation, match="both access"):
                load(x.data_ptr() + 8)
        memory.launched()  # another kernel comes after
        store(x.data_ptr(), np.float32(1))
