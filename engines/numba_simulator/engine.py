"""The engine and the backend as it presents itself inside: CPU problems, judged and run as if on an sm_90."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.numba_cuda.backend import NumbaCuda
from ...backends.numba_cuda.space import every_config
from ...registry.backend import Backend, Config, Runner
from ...registry.decision import Verdict
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .fibers import SCHEDULES, Schedule
from .memory import CheckedMemory
from .simulator import Simulator

__all__ = ["NumbaSimulator", "SimulatedNumbaCuda", "load"]


class NumbaSimulator:
    """Implements ``registry.conformance.subject.Engine``."""

    name = "numba_simulator"

    def __init__(self) -> None:
        from .target import simulated

        self.memory = CheckedMemory()
        self.target = simulated(self.memory, self._exchange)
        self.schedule: Schedule = SCHEDULES[0]
        self.running = Simulator(self.schedule)

    def watch_addresses(self, tensors: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
        """While active, an access outside ``tensors``, or one that another block's may race, raises Violation."""
        return self.memory.watching(tensors)

    def schedules(self) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
        """Thread schedules by name; see ``fibers.SCHEDULES``."""
        for schedule in SCHEDULES:
            yield schedule.name, partial(self.scheduled, schedule)

    @contextmanager
    def scheduled(self, schedule: Schedule) -> Iterator[None]:
        """While active, threads run in this order."""
        before, self.schedule = self.schedule, schedule
        try:
            yield
        finally:
            self.schedule = before

    def launch(
        self, kernel: Callable[..., None], grid: tuple[int, int, int], threads: int, args: tuple[Any, ...]
    ) -> None:
        """Run a kernel built for :attr:`target`."""
        self.memory.launched()
        self.running = Simulator(self.schedule)
        self.running.launch(kernel, grid, threads, args, self._on_block)

    def _exchange(self, n: int) -> Callable[..., None]:
        return lambda values, mask, out: self.running.exchange_xor(values, n, mask, out)

    def _on_block(self, block: int) -> None:
        self.memory.block = block


def load() -> tuple[Backend, NumbaSimulator]:
    """The backend inside the engine, and the engine."""
    engine = NumbaSimulator()
    return SimulatedNumbaCuda(engine), engine


class SimulatedNumbaCuda(Backend):
    """``numba_cuda`` on CPU tensors: the same predicate, configs, kernel and argument packing, another launch."""

    op = NumbaCuda.op
    name = NumbaCuda.name
    provenance = NumbaCuda.provenance
    tags = NumbaCuda.tags
    priority = NumbaCuda.priority

    def __init__(self, engine: NumbaSimulator) -> None:
        self.engine = engine
        self.inner = NumbaCuda()

    def check(self, problem: Problem) -> Verdict:
        return self.inner.check(_on_gpu(problem))

    def configs(self, problem: Problem) -> Sequence[Config]:
        """Those of the GPU, behind the one that costs least to simulate with several warps and columns in play."""
        on_gpu = _on_gpu(problem)
        cheapest = min(every_config(on_gpu), key=partial(_cost, on_gpu))
        return tuple(dict.fromkeys((cheapest, *self.inner.configs(on_gpu))))

    def bind(self, problem: Problem, config: Config) -> Runner:
        from ...backends.numba_cuda import parameters
        from ...backends.numba_cuda.kernel import recurrence
        from ...backends.numba_cuda.places import grid
        from ...backends.numba_cuda.variant import Variant

        engine = self.engine
        packer = parameters.packer(Variant.of(problem, config, wide=True))

        def run(call: Call) -> torch.Tensor:
            assert call.out is not None
            if call.n and call.tokens:
                block = [0] * parameters.INTEGERS
                packer.fill(call, block)
                variant = Variant.of(problem, config, wide=parameters.is_aligned(block))
                strides = tuple(block[parameters.STRIDE_AT : parameters.NUMBER_AT])
                args = (
                    *block[: parameters.STRIDE_AT],
                    strides,
                    *map(int, block[parameters.NUMBER_AT :]),
                    *map(np.float32, parameters.floats(call)),
                )
                blocks = grid(variant, call.n, call.hv)
                engine.launch(recurrence(variant, engine.target), blocks, variant.threads, args)
            return call.out

        return run

    def sources(self) -> Sequence[Path]:
        return self.inner.sources()


def _cost(problem: Problem, config: Config) -> tuple[bool, int]:
    from ...backends.numba_cuda.variant import Variant

    variant = Variant.of(problem, config, wide=True)
    return variant.warps == 1 or variant.columns == 1, variant.threads * variant.tiles


def _on_gpu(problem: Problem) -> Problem:
    return replace(problem, device="cuda", arch=90)
