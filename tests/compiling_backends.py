"""Backends that leave a trace of being compiled, found by compiler processes through this file's path alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from isokern.registry import Accepted, Backend

TRACES = "ISOKERN_TEST_TRACES"
#: A case of so many tokens takes DawdlesAtOne forever.
DAWDLES_AT = 4


class Traced(Backend):
    op, name, provenance = "fused_sigmoid_gating", "traced", "external"

    def check(self, problem):
        return Accepted()

    def bind(self, problem, config):
        raise AssertionError("compiling binds nothing")

    def compile(self, problem, config):
        what = {
            "pid": os.getpid(),
            "device": problem.device,
            "arch": problem.arch,
            "sees": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "nice": os.nice(0),
            "case": problem.profile.label,
        }
        Path(os.environ[TRACES], f"{time.monotonic_ns()}.json").write_text(json.dumps(what))


class Refuses(Traced):
    name = "refuses"

    def compile(self, problem, config):
        raise RuntimeError("no such instruction")


class Dies(Traced):
    name = "dies"

    def compile(self, problem, config):
        os._exit(7)


class Dawdles(Traced):
    name = "dawdles"

    def compile(self, problem, config):
        super().compile(problem, config)
        time.sleep(600)


class DawdlesAtOne(Traced):
    name = "dawdles_at_one"

    def compile(self, problem, config):
        super().compile(problem, config)
        if problem.profile.tokens == DAWDLES_AT:
            time.sleep(600)
