"""Third-party backends with planted faults, found by workers through this file's path alone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

from isokern.backends.torch_native.reference import run_reference
from isokern.registry import Accepted, Backend, Config

OP = "fused_sigmoid_gating"


class Planted(Backend):
    """The reference; subclasses spoil it in ``run``."""

    op = OP
    provenance = "external"
    priority = 10

    def check(self, problem):
        return Accepted()

    def bind(self, problem, config):
        return self.run

    def run(self, call):
        return run_reference(call)


class Honest(Planted):
    name = "honest"
    priority = 90


class Swift(Planted):
    name = "swift"


class Sluggish(Planted):
    name = "sluggish"
    priority = 90

    def run(self, call):
        time.sleep(0.03)
        return run_reference(call)


class Rounding(Planted):
    """Off by less than a kernel with rounded operands may be, and more than one that computes in float32."""

    name = "rounding"
    accuracy = "rounded"

    def configs(self, problem):
        return (Config.of(chunk=64),)

    def run(self, call):
        return run_reference(call).mul_(1.003)


class SluggishRival(Sluggish):
    name = "sluggish_rival"
    priority = 5


class WrongHead(Planted):
    """Wrong in one head of several, and by less than the field's usual tolerance."""

    name = "wrong_head"

    def run(self, call):
        out = run_reference(call)
        out[:, :, -1] *= 1.02
        return out


class WrongLater(Planted):
    """Right whenever its output holds zeros, wrong from the second call on."""

    name = "wrong_later"

    def __init__(self):
        self.calls = 0

    def bind(self, problem, config):
        self.calls = 0
        return self.run

    def run(self, call):
        out = run_reference(call)
        self.calls += 1
        if self.calls > 1:
            out[:, 0] += 0.5
        return out


class NanTail(Planted):
    """Leaves the last token's row as it was."""

    name = "nan_tail"

    def run(self, call):
        last = call.offsets[-1] - 1
        kept = call.out[:, last].clone()
        out = run_reference(call)
        out[:, last] = kept
        return out


class Hangs(Planted):
    name = "hangs"

    def run(self, call):
        time.sleep(1000)


class Exits(Planted):
    name = "exits"

    def run(self, call):
        os._exit(0)


class PrintsAndExits(Planted):
    name = "prints_and_exits"

    def run(self, call):
        print('{"result": {"code": null, "seconds": [1e-9]}}', flush=True)
        print("kernel says goodbye", flush=True)
        sys.exit(3)


class Raises(Planted):
    name = "raises"

    def run(self, call):
        raise IndexError("tile 7 of 4")


class FailsToBind(Planted):
    name = "fails_to_bind"

    def bind(self, problem, config):
        raise RuntimeError("ptxas: unsupported .version")


class Segfaults(Planted):
    name = "segfaults"

    def run(self, call):
        return ctypes.string_at(0)


class Forks(Planted):
    name = "forks"

    def run(self, call):
        os.fork()  # parent and child both go on as if they were the worker
        return run_reference(call)


class ModifiesInput(Planted):
    name = "modifies_input"

    def run(self, call):
        out = run_reference(call)
        call.k[:, 0] = 0
        return out


class WritesForeignSlot(Planted):
    name = "writes_foreign_slot"

    def run(self, call):
        out = run_reference(call)
        named = {int(s) for s in call.read_slots}
        free = next(s for s in range(call.pool.shape[0]) if s not in named)
        call.pool[free, 0, 0, 0] += 1
        return out


class FastAndWrong(Planted):
    """Does nothing at all, quickly."""

    name = "fast_and_wrong"

    def run(self, call):
        return call.out.zero_()


class Greedy(Planted):
    name = "greedy"

    def run(self, call):
        raise MemoryError


class HangsWithChild(Planted):
    name = "hangs_with_child"

    def run(self, call):
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)", "planted-child"], check=True)
