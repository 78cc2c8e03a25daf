"""GPU backends with planted faults, found by workers through this file's path alone.

All but one compute with a kernel that is right, and then do one thing wrong that an engine would pay for.
"""

from __future__ import annotations

import functools
import os
import sys
import time

import torch

from isokern.backends.triton.backend import Triton
from isokern.registry import Accepted, Backend, Config, RejectCode, Rejected

_SOURCE = r"""
extern "C" __global__ void hang(volatile int* stop) { while (!*stop) __nanosleep(1000); }
extern "C" __global__ void poke(long long address) { *(volatile int*)address = 1; }
extern "C" __global__ void jitter(unsigned* pool, const int* slots, long long per_slot) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  unsigned long long t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  if (i < per_slot && slots[0] >= 0 && (t >> 5 & 1)) pool[slots[0] * per_slot + i] ^= 1;  // far inside the bound
}
"""


@functools.cache
def kernel(name):
    import cupy

    return cupy.RawModule(code=_SOURCE).get_function(name)


class OnCuda(Backend):
    """A right kernel; subclasses spoil ``after``."""

    op = "fused_sigmoid_gating"
    provenance = "external"
    priority = 10

    def check(self, problem):
        return Accepted() if problem.device == "cuda" else Rejected(RejectCode.DEVICE, "CUDA only")

    def bind(self, problem, config):
        honest = Triton()
        self.calls = 0
        run = honest.bind(problem, honest.configs(problem)[0])

        def spoiled(call):
            out = run(call)
            self.calls += 1
            self.after(call, out)
            return out

        return spoiled

    def after(self, call, out):
        pass


class HonestOnCuda(OnCuda):
    name = "planted_honest"
    priority = 90


class WrongHead(OnCuda):
    """By less than the field's usual tolerance."""

    name = "planted_wrong_head"

    def after(self, call, out):
        out[:, :, -1] *= 1.02


class WrongLater(OnCuda):
    name = "planted_wrong_later"

    def after(self, call, out):
        if self.calls > 1:
            out[:, 0] += 0.5


class NanTail(OnCuda):
    name = "planted_nan_tail"

    def after(self, call, out):
        out[:, call.offsets[-1] - 1] = float("nan")


class Racy(OnCuda):
    """States, which are float32, differ in their last bit from run to run."""

    name = "planted_racy"

    def after(self, call, out):
        import cupy

        n = call.pool[0].numel()
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            kernel("jitter")(((n + 255) // 256,), (256,), (call.pool.data_ptr(), call.write_slots.data_ptr(), n))


class Hangs(OnCuda):
    name = "planted_hangs"

    def after(self, call, out):
        self.stop = torch.zeros(1, dtype=torch.int32, device="cuda")
        kernel("hang")((1,), (1,), (self.stop.data_ptr(),))


class IllegalAccess(OnCuda):
    name = "planted_illegal_access"

    def after(self, call, out):
        kernel("poke")((1,), (1,), (64,))


class WritesSlotZero(OnCuda):
    """Takes a missing slot for the first one."""

    name = "planted_writes_slot_zero"

    def after(self, call, out):
        call.pool[0] += (call.write_slots < 0).any()  # asked on the device: no capture minds


class PrintsAndExits(OnCuda):
    name = "planted_prints_and_exits"

    def after(self, call, out):
        print('{"result": {"code": null, "seconds": [1e-9]}}', flush=True)
        sys.exit(3)


class Forks(OnCuda):
    name = "planted_forks"

    def after(self, call, out):
        if os.fork() == 0:
            os._exit(0)


class SlowFirstCall(OnCuda):
    """Right, and fast from the second call on: what its first call costs must not count."""

    name = "planted_slow_first_call"

    def after(self, call, out):
        if self.calls == 1:
            time.sleep(0.1)


class Greedy(OnCuda):
    name = "planted_greedy"

    def after(self, call, out):
        self.kept = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(1000)]


class DoesNothing(OnCuda):
    name = "planted_does_nothing"

    def bind(self, problem, config: Config):
        return lambda call: call.out


#: The verdict each must end with; None: it is right, and may race.
EXPECTED = {
    HonestOnCuda: None,
    WrongHead: RejectCode.WRONG,
    WrongLater: RejectCode.NOT_REPEATABLE,
    NanTail: RejectCode.NON_FINITE,
    Racy: RejectCode.NOT_REPEATABLE,
    Hangs: RejectCode.TIMEOUT,
    IllegalAccess: RejectCode.RAISED,
    WritesSlotZero: RejectCode.CANARY,
    PrintsAndExits: RejectCode.CRASH,
    Forks: RejectCode.CRASH,
    SlowFirstCall: None,
    Greedy: RejectCode.MEMORY,
    DoesNothing: RejectCode.NON_FINITE,
}
