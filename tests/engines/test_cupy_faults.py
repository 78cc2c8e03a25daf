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
_COMMON = {"lanes": 8, "rows": 1, "stream": True, "resident": 1}
STAGED = Config.of(**_COMMON, warps=4, helpers=0, staged=True, landing=False, tokens=2)
HELPED = Config.of(**_COMMON, warps=2, helpers=2, staged=True, landing=False, tokens=4)
DIRECT = Config.of(**_COMMON, warps=2, helpers=0, staged=False, landing=True, tokens=0)


def call_of(spec: CaseSpec) -> Call:
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype)
    return call


def runner(spec: CaseSpec, config: Config, good: str, bad: str) -> Callable[[Call], torch.Tensor]:
    text = source()
    assert good in text, "the planted fault no longer applies: plant another"
    specialization = Specialization.of(call_of(spec).problem(), config)
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


@pytest.mark.parametrize("config", [STAGED, HELPED, DIRECT], ids=lambda config: config.label)
def test_nothing_is_found_without_a_fault(config):
    right = runner(SPEC, config, "meet();", "meet();")
    assert not any(found_by(means, SPEC, right) for means in ("values", "error", "watch"))


def test_helpers_and_the_others_meet_whatever_the_number_of_windows():
    """A window holds 8 tokens here: none, parts of one, whole ones, and one token more, in one launch."""
    spec = SPEC.but(lengths=(0, 1, 7, 8, 9, 16, 17, 24, 25), padded=())
    right = runner(spec, HELPED, "meet();", "meet();")
    assert not any(found_by(means, spec, right) for means in ("values", "error", "watch"))


_EMPTY = "if (it.length <= 0) return;"
_MEET = "meet_by_name<1, Shape::THREADS>();"
FAULTS: dict[str, tuple[Config, str, str, str]] = {
    "no barrier between windows": (
        STAGED,
        "fetcher.fetch(done + count, ahead);\n    meet();",
        "fetcher.fetch(done + count, ahead);",
        "watch",
    ),
    "helpers that do not meet the others": (
        HELPED,
        "fetcher.fetch(done + count, ahead);\n    meet();",
        "fetcher.fetch(done + count, ahead);\n    if (COMPUTES) meet();",
        "error",
    ),
    "helpers that meet the others at __syncthreads": (HELPED, _MEET, "__syncthreads();", "error"),
    "helpers that go by another name": (
        HELPED,
        "fetcher.fetch(done + count, ahead);\n    meet();",
        "fetcher.fetch(done + count, ahead);\n    if (COMPUTES) meet();\n    else meet_by_name<2, Shape::THREADS>();",
        "error",
    ),
    "a barrier that does not count the helpers": (HELPED, _MEET, "meet_by_name<1, 32 * Shape::WARPS>();", "error"),
    "one window instead of two": (
        STAGED,
        "fetcher.finish(stages[side ^ 1], ahead)",
        "fetcher.finish(stages[side], ahead)",
        "watch",
    ),
    "helpers a window ahead of themselves": (
        HELPED,
        "fetcher.finish(stages[side ^ 1], ahead)",
        "fetcher.finish(stages[side], ahead)",
        "watch",
    ),
    "no barrier before the first token": (
        STAGED,
        "fetcher.fetch(count, ahead);\n  meet();",
        "fetcher.fetch(count, ahead);",
        "watch",
    ),
    "a warp barrier where all must meet": (STAGED, "else __syncthreads();", "else __syncwarp();", "watch"),
    "a barrier only some warps reach": (
        STAGED,
        "  meet();\n  int64 done = 0;",
        "  if (threadIdx.x >= 32) __syncthreads();\n  meet();\n  int64 done = 0;",
        "error",
    ),
    "outputs truncated": (STAGED, "p->bits = float_to_bfloat(x);", "p->bits = __float_as_uint(x) >> 16;", "values"),
    "one shuffle short": (STAGED, "for (int step = 0; step < 5;", "for (int step = 0; step < 4;", "values"),
    "a group's norm over half its lanes": (DIRECT, "sum_to_all(factor);", "", "values"),
    "a window fetched twice": (STAGED, "fetcher.fetch(done + count, ahead)", "fetcher.fetch(done, ahead)", "values"),
    "a token read twice": (DIRECT, "else reader.next(token);", "", "values"),
    "output one token late": (STAGED, "scale_, at_, done_ > 0)", "scale_, at_, true)", "watch"),
    "a state that never arrives": (DIRECT, "if (t == 0) recurrence.arrive(landing);", "", "values"),
    "two threads land in one place": (DIRECT, "[x][threadIdx.x];", "[x][threadIdx.x ^ 1];", "watch"),
    "negative slots written": (STAGED, "if (it_.target >= 0)", "if (it_.target >= -1)", "watch"),
    "negative slots read": (STAGED, "Shape::READ && it_.source >= 0 && it_.length", "it_.length", "watch"),
    "an empty sequence computed": (STAGED, _EMPTY, "if (it.length < 0) return;", "watch"),
    "an empty sequence decoded": (DIRECT, _EMPTY, "if (it.length < 0) return;", "watch"),
    "key channels beyond K": (STAGED, "return Shape::K == Shape::KEYS || k < Shape::K;", "return true;", "watch"),
    "rows beyond V": (STAGED, "return Shape::WHOLE_TILES || row + r < Shape::V;", "return true;", "watch"),
    "tokens beyond the end fetched": (STAGED, "if (slot < count) {", "if (slot <= count) {", "watch"),
    "two blocks on one head": (STAGED, "hv = blockIdx.x / Shape::TILES,", "hv = 0,", "watch"),
    "32-bit slot offsets": (
        STAGED,
        "(T*)data + slot * s.slot",
        "(T*)data + (int)slot * 1000000 * (int)s.slot",
        "error",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, record_property):
    config, good, bad, means = FAULTS[name]
    assert found_by(means, SPEC, runner(SPEC, config, good, bad))
    record_property("planted fault", f"cupy        {name:50} found by {means}")
