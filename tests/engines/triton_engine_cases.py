"""Small Triton kernels with known behaviour, run in the interpreter; ``python triton_engine_cases.py`` prints JSON.

Not a test module: the interpreter must be chosen before Triton is imported, so ``test_triton_engine`` runs this file in
a process of its own. Each ``case_*`` raises AssertionError if the engine misses what it plants.
"""

import json
import re
import traceback

import numpy as np
import pytest
import torch

from isokern.engines.triton_interpreter import activate
from isokern.engines.triton_interpreter.engine import InterpretedBackend
from isokern.errors import IsokernError
from isokern.registry.conformance.check import Violation
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

ENGINE = activate()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, tl.where(a < b, a * b + a, tl.maximum(a, b) - b))


@triton.jit
def sum_kernel(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), axis=0))


@triton.jit
def fma_kernel(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@triton.jit
def copy_kernel(x, y, count, stride, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.load(x + i * stride, mask=i < count, other=0.0), mask=i < count)


@triton.jit
def accumulate_kernel(total, x):
    tl.store(total, tl.load(total) + tl.load(x + tl.program_id(0)))


@triton.jit
def shift_kernel(x):
    program = tl.program_id(0)
    tl.store(x + program, tl.load(x + program + 1))


@triton.jit
def place_kernel(x):
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(x + place, place + 1)


@triton.jit
def scatter_kernel(x, where, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + tl.load(where + i), i.to(tl.float32))


@triton.jit
def read_back_kernel(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + i, tl.load(x + (N - 1 - i)))


_FAILURES = (AssertionError, LookupError, RuntimeError, TypeError, ValueError, pytest.fail.Exception)


def _caught(run, text):
    with pytest.raises(Violation, match=re.escape(text)):
        run()


def _same_bits(x, y):
    same = (x.view(torch.int16) == y.view(torch.int16)) | (x.isnan() & y.isnan())
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ"


def case_every_bfloat16_widens_exactly():
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    y = torch.empty(1 << 16)
    cast_kernel[(1,)](x, y, N=1 << 16)
    assert torch.equal(y.nan_to_num(1.5), x.float().nan_to_num(1.5))


def case_float32_to_bfloat16_rounds_to_nearest_even():
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 15, dtype=np.uint32)
    halfway = np.arange(1 << 15, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)
    x = torch.from_numpy(np.concatenate([bits, halfway]).view(np.float32))
    y = torch.empty(1 << 16, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=1 << 16)
    _same_bits(y, x.to(torch.bfloat16))


def case_bfloat16_arithmetic_is_that_of_the_values():
    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, out, N=1024)
    _same_bits(out, torch.where(x < y, x * y + x, torch.maximum(x, y) - y))


def case_bfloat16_sums_in_float32():
    x = torch.full((1024,), 1.0 + 2**-7, dtype=torch.bfloat16)
    out = torch.empty(1, dtype=torch.bfloat16)
    sum_kernel[(1,)](x, out, N=1024)
    assert out.item() == 1032.0  # 1024 * 1.0078125, a bfloat16; the sum of bit patterns is not


def case_fma_rounds_once():
    x = torch.tensor([1 + 2**-12, 3.0])
    z = -(x * x)
    out = torch.empty(2)
    fma_kernel[(1,)](x, x, z, out, N=2)
    assert out.tolist() == [2**-24, 0.0]


def case_clean_kernel_passes():
    x, y = torch.randn(20), torch.full((20,), 7.0)
    with ENGINE.watch_addresses({"x": x, "y": y}):
        copy_kernel[(2,)](x, y, 20, 1, N=16)
    assert torch.equal(x, y)


def case_load_beyond_the_end():
    x, y = torch.randn(20), torch.zeros(32)
    with ENGINE.watch_addresses({"x": x[:19], "y": y}):
        _caught(lambda: copy_kernel[(2,)](x, y, 20, 1, N=16), "loads 1 of 4 elements that belong to no tensor")


def case_store_beyond_the_end():
    x, y = torch.randn(32), torch.zeros(32)
    with ENGINE.watch_addresses({"x": x, "y": y[:20]}):
        _caught(lambda: copy_kernel[(2,)](x, y, 21, 1, N=16), "stores 1 of 5 elements")
    assert y[20] == 0  # refused before it was done


def case_memory_that_launches_share_is_watched_and_nan_until_written():
    x = torch.randn(16)
    with ENGINE.watch_addresses({"x": x}):
        shared = ENGINE.executor.workspace(16, x.device)
        assert shared.isnan().all()
        copy_kernel[(1,)](x, shared, 16, 1, N=16)
        assert torch.equal(shared, x)
        _caught(
            lambda: copy_kernel[(1,)](x, shared[8:], 16, 1, N=16), "stores 8 of 16 elements that belong to no tensor"
        )
    assert ENGINE.executor.lent is None


def case_a_number_in_an_array_of_one_bounds_a_loop():
    handle = triton.runtime.interpreter.TensorHandle(np.array([3], np.int32), tl.int32)
    assert list(range(tl.tensor(handle, tl.int32))) == [0, 1, 2]


def case_gap_between_strides():
    x, y = torch.randn(40), torch.zeros(20)
    with ENGINE.watch_addresses({"x": x[::2], "y": y}):
        copy_kernel[(2,)](x, y, 20, 2, N=16)
        _caught(lambda: copy_kernel[(2,)](x, y, 20, 1, N=16), "belong to no tensor")


def case_write_write_race():
    total, x = torch.zeros(1), torch.ones(4)
    with ENGINE.watch_addresses({"total": total, "x": x}):
        _caught(lambda: accumulate_kernel[(4,)](total, x), "loads what program (0, 0, 0) stores")


def case_read_write_race_in_every_order():
    for _, schedule in ENGINE.schedules():
        x = torch.arange(5.0)
        with ENGINE.watch_addresses({"x": x}), schedule():
            _caught(lambda x=x: shift_kernel[(4,)](x), "race")


def case_launches_do_not_race_with_one_another():
    total, x = torch.zeros(1), torch.ones(4)
    with ENGINE.watch_addresses({"total": total, "x": x}):
        for _ in range(3):
            accumulate_kernel[(1,)](total, x)
    assert total.item() == 3


def case_two_lanes_store_to_one_element():
    x, where = torch.zeros(8), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    with ENGINE.watch_addresses({"x": x, "where": where}):
        _caught(lambda: scatter_kernel[(1,)](x, where, N=8), "stores twice to one element")


def case_reading_back_needs_a_barrier():
    x, y = torch.zeros(8), torch.zeros(8)
    with ENGINE.watch_addresses({"x": x, "y": y}):
        read_back_kernel[(1,)](x, y, N=8, BARRIER=True)
        _caught(lambda: read_back_kernel[(1,)](x, y, N=8, BARRIER=False), "with no barrier between")


def case_schedules_show_in_what_depends_on_order():
    seen = set()
    for _, schedule in ENGINE.schedules():
        x = torch.arange(6.0)
        with schedule():
            shift_kernel[(5,)](x)
        seen.add(tuple(x.tolist()))
    assert len(seen) >= 4, seen


def case_every_schedule_runs_every_program_once():
    for name, schedule in ENGINE.schedules():
        total = torch.zeros(1)
        with schedule():
            accumulate_kernel[(7,)](total, 2.0 ** torch.arange(7))
        assert total.item() == 127, name


def case_launches_are_counted():
    before = ENGINE.executor.launches
    accumulate_kernel[(3,)](torch.zeros(1), torch.ones(3))
    assert ENGINE.executor.launches == before + 1


def case_cannot_be_activated_after_triton():
    with pytest.raises(IsokernError, match="process of its own"):
        activate()


def case_programs_run_along_x_then_y_then_z():
    places = torch.zeros(12, dtype=torch.int32)
    seen = []
    ENGINE.executor.between = lambda program: seen.append(program) if program else None
    try:
        place_kernel[(2, 3, 2)](places)
    finally:
        ENGINE.executor.between = None
    assert seen == [(x, y, z) for z in range(2) for y in range(3) for x in range(2)]
    assert places.tolist() == list(range(1, 13))


def case_sequences_beyond_the_grids_y_axis_go_on_along_z():
    """The backend's kernel: two layers of two and one half full, in which nothing may be touched."""
    from isokern.backends.triton import arguments
    from isokern.backends.triton.backend import Triton

    backend = InterpretedBackend(Triton())
    for lengths in ((1,) * 5, (2, 1, 3, 1, 2)):
        spec = CaseSpec("five", lengths, padded=(1,), h=1, hv=2, k=8, v=12)
        left, last = [], []

        def noted(programs, last=last):
            last.append(programs[-1])
            return programs

        for most in (65535, 2):
            call = canonical_call(**make_inputs(spec).kwargs)
            call.out = torch.zeros(call.v.shape, dtype=call.q.dtype)
            problem = call.problem()
            run = backend.bind(problem, backend.configs(problem)[0])
            with pytest.MonkeyPatch.context() as patch, ENGINE.watch_addresses(call.tensors()):
                patch.setattr(arguments, "_MOST_Y", most)
                with ENGINE.executor.ordered(noted):
                    run(call)
            left.append((call.out, call.pool))
        assert last == [(1, 4, 0), (1, 1, 2)]
        for x, y in zip(*left, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


def main():
    found = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            try:
                case()
                found[name] = ""
            except _FAILURES:
                found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
