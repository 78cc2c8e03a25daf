"""Who runs a mixed batch in ``host_cost.py``: ``composite``, and each of its two kernels whole.

On a GPU the registry's own backends, ``composite`` once with its kernels one after another and once beside each other.
Without one the same launchers over a driver that launches nothing, and workspaces of a few bytes, since a CPU's
allocator takes longer for large ones than a GPU's caching allocator does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from isokern import registry
from isokern.backends.composite.backend import Composite
from isokern.backends.launch.chain import Chain
from isokern.backends.launch.driver import Driver
from isokern.backends.launch.launcher import Launcher
from isokern.registry import Registry
from isokern.registry.backend import Backend, Config, Runner
from isokern.registry.decision import Verdict
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.op import FusedSigmoidGating
from isokern.registry.ops.fused_sigmoid_gating.problem import Problem
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC

__all__ = ["MIXED", "Unlaunched", "mixed_ops"]

OP = "fused_sigmoid_gating"
#: Decode rows and a prompt, in the shapes of the decode steps. Short: sizes cost the host nothing but an allocation.
MIXED = CaseSpec(
    "mixed 15x1+1x128 H=16 HV=32 float32", (1,) * 15 + (128,), h=16, hv=32, k=128, v=128, state_layout="vk",
    as_layout=True,
)  # fmt: skip
#: Of ``composite``: what runs the rows, what runs the prompt.
PARTS = ("cupy", "cupy_chunked")
_WORKSPACE = 64


class Unlaunched(Backend):
    """A CUDA C++ backend on tensors of a CPU, as if they were on an H100, up to the driver's door."""

    op = OP
    provenance = "cupy"
    tags = frozenset({"repeatable"})

    def __init__(self, inner: Backend, driver: Driver) -> None:
        self.inner, self.driver = inner, driver
        self.name, self.accuracy, self.priority = inner.name, inner.accuracy, inner.priority

    def rank(self, problem: Problem) -> int:
        return self.inner.rank(_on_gpu(problem))

    def check(self, problem: Problem) -> Verdict:
        return self.inner.check(_on_gpu(problem))

    def configs(self, problem: Problem) -> Sequence[Config]:
        return self.inner.configs(_on_gpu(problem))

    def bind(self, problem: Problem, config: Config) -> Runner:
        launched = partial(Launcher, self.name, _on_gpu(problem), config, driver=self.driver)
        if self.name == "cupy":
            from isokern.backends.cupy.launcher import compiler

            return launched(compiler(_on_gpu(problem), config))
        from isokern.backends.cupy_chunked.launcher import compilers

        each = compilers(_on_gpu(problem), config, self.inner.pieces)
        return Chain([launched(compiler) for compiler in each], lambda call: _WORKSPACE)


def _on_gpu(problem: Problem) -> Problem:
    return replace(problem, device="cuda", arch=90)


def mixed_ops(driver: Driver) -> Mapping[tuple[str, str], FusedSigmoidGating]:
    """The op as ``(implementation, backend)``, the backend to be named in its calls; none is another's, or anybody's.
    ``driver``: one that launches nothing, used without a GPU.
    """
    known = registry.backends(OP)
    if torch.cuda.is_available():
        ops = {("isokern op", name): _own_op(known[name]) for name in PARTS}
        for streams, words in ((1, "one stream"), (2, "two streams")):
            ops[f"isokern op, {words}", "composite"] = _own_op(_OnStreams(streams))
        return ops
    parts = {name: Unlaunched(known[name], driver) for name in PARTS}
    every = {"composite": Composite(lambda: parts), **parts}
    return {("isokern op, not launched", name): _own_op(*every.values()) for name in every}


class _OnStreams(Composite):
    """``composite`` with the rows and the prompt on :data:`PARTS`, on so many streams."""

    def __init__(self, streams: int) -> None:
        super().__init__(lambda: {name: registry.backends(OP)[name] for name in PARTS})
        self._only = streams

    def configs(self, problem: Problem) -> Sequence[Config]:
        [first, *_] = super().configs(problem)
        return (Config.from_dict(first.to_dict() | {"streams": self._only}),)


def _own_op(*backends: Backend) -> FusedSigmoidGating:
    own = Registry({}, load_plugins=False)
    own.register_op(SPEC)
    for backend in backends:
        own.register_backend(backend)
    op: FusedSigmoidGating = own.get(OP)
    return op
