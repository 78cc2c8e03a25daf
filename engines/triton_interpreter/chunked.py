"""The chunked Triton backend on CPU tensors, its kernels interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...registry.backend import Backend, Config, Runner
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .engine import InterpretedBackend, TritonInterpreter, activate, on_gpu

if TYPE_CHECKING:
    from ...backends.triton_chunked.backend import TritonChunked

__all__ = ["load"]


def load() -> tuple[Backend, TritonInterpreter]:
    """The backend inside the engine, and the engine. As :func:`isokern.engines.triton_interpreter.engine.activate`."""
    engine = activate()
    from ...backends.triton_chunked.backend import TritonChunked

    return _Interpreted(TritonChunked(), engine), engine


class _Interpreted(InterpretedBackend):
    """As the others are; the workspace is the engine's, which knows it for memory of the call."""

    def __init__(self, inner: TritonChunked, engine: TritonInterpreter) -> None:
        super().__init__(inner)
        self._pieces, self._engine = inner.pieces, engine

    def configs(self, problem: Problem) -> Sequence[Config]:
        return sorted(self.inner.configs(on_gpu(problem)), key=lambda c: -int(c["v_tile"]))

    def bind(self, problem: Problem, config: Config) -> Runner:
        from ...backends.triton_chunked.launcher import Interpreted

        workspace = self._engine.executor.workspace
        return Interpreted(self.inner.name, on_gpu(problem), config, self._pieces, workspace)
