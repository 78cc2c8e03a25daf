"""Faults planted in the kernel's own source: each must be found by something the engine or the suite does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from isokern.backends.cupy.compiling import NAME, source
from isokern.backends.cupy.launcher import Launcher
from isokern.backends.cupy.specialization import Specialization
from isokern.engines.cuda_on_cpu.engine import CudaOnCpu
from isokern.engines.cuda_on_cpu.raw_kernel import CpuRawKernel, KernelError
from isokern.registry.backend import Config
from isokern.registry.conformance.check import Violation
from isokern.registry.ops.fused_sigmoid_gating.call import Call
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

#: Two windows and more per sequence, an empty one, one without a slot, K and V that fill no vector.
SPEC = CaseSpec("faults", (19, 0, 9), h=1, hv=2, k=20, v=24, padded=(2,))
CONFIG = Config.of(lanes=8, rows=1, warps=4, tokens=2, stream=True)


def call_of(spec: CaseSpec) -> Call:
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype)
    return call


def runner(spec: CaseSpec, good: str, bad: str) -> Callable[[Call], torch.Tensor]:
    text = source()
    assert good in text, "the planted fault no longer applies: plant another"
    specialization = Specialization.of(call_of(spec).problem(), CONFIG)
    kernel = CpuRawKernel(text.replace(good, bad), NAME, specialization.options())
    return Launcher(lambda grid, block, args, device: kernel(grid, block, args), specialization)


def found_by(means: str, spec: CaseSpec, run: Callable[[Call], torch.Tensor]) -> bool:
    """Whether the fault shows in the values, as an error of the engine, or to the watch (which stops it in time)."""
    call = call_of(spec)
    if means == "watch":
        try:
            with CudaOnCpu().watch_addresses(call.tensors()):
                run(call)
        except Violation:
            return True
        return False
    exact = reference(call)
    try:
        run(call)
    except KernelError:
        return means == "error"
    return means == "values" and not judge(call, call.out, exact).ok


def test_nothing_is_found_without_a_fault():
    right = runner(SPEC, "meet();", "meet();")
    assert not any(found_by(means, SPEC, right) for means in ("values", "error", "watch"))


FAULTS: dict[str, tuple[str, str, str]] = {
    "no barrier between windows": ("before the last meeting\n    meet();", "\n", "watch"),
    "one window instead of two": (
        "fetcher.finish(stages[side ^ 1], ahead)",
        "fetcher.finish(stages[side], ahead)",
        "watch",
    ),
    "no barrier before the first token": ("finish(stages[0], count);\n  meet();", "finish(stages[0], count);", "watch"),
    "a warp barrier where all must meet": ("else __syncthreads();", "else __syncwarp();", "watch"),
    "a barrier only some warps reach": (
        "finish(stages[0], count);\n",
        "finish(stages[0], count); if (warp) __syncthreads();\n",
        "error",
    ),
    "outputs truncated": ("p->bits = float_to_bfloat(x);", "p->bits = __float_as_uint(x) >> 16;", "values"),
    "one shuffle short": ("for (int mask = 16; mask; mask /= 2)", "for (int mask = 16; mask > 1; mask /= 2)", "values"),
    "a window fetched twice": ("fetcher.fetch(done + count, ahead)", "fetcher.fetch(done, ahead)", "values"),
    "output one token late": ("outputs.write(o, at, begun);", "outputs.write(o, at, true);", "watch"),
    "negative slots written": ("if (target >= 0) {", "if (target >= -1) {", "watch"),
    "negative slots read": ("if (source >= 0) load_state<Shape::STREAM>", "load_state<Shape::STREAM>", "watch"),
    "an empty sequence computed": ("if (length <= 0) return;", "if (length < 0) return;", "watch"),
    "key channels beyond K": ("return Shape::K == Shape::KEYS || k < Shape::K;", "return true;", "watch"),
    "rows beyond V": ("return Shape::WHOLE_TILES || row + r < Shape::V;", "return true;", "watch"),
    "tokens beyond the end fetched": ("if (slot < count) {", "if (slot <= count) {", "watch"),
    "32-bit slot offsets": (
        "(const State*)p.pool.data + source * p.pool.slot",
        "(const State*)p.pool.data + (int)source * 1000000 * (int)p.pool.slot",
        "error",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    good, bad, means = FAULTS[name]
    assert found_by(means, SPEC, runner(SPEC, good, bad))
