"""Chain: a call as several kernels, one after another on one stream, over the same tensors and a workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...registry.backend import Pinned
from ...registry.ops.fused_sigmoid_gating.call import Call
from .launcher import Launcher, Runner

__all__ = ["Chain"]


class Chain(Runner):
    """The bound runner of kernels that leave each other something in memory that is nobody's argument.

    The workspace is allocated per call by torch's caching allocator, on the stream of the launches: two calls on one
    stream may share it, for the second runs after the first; two streams get two; a CUDA graph keeps its own.

    Args:
        launchers: one for each kernel, in order; ``Layout.scratch`` says where each wants the workspace's address.
        workspace: bytes that a call needs, from its shapes alone.

    Raises as :class:`Launcher`. If a later kernel's launch fails, the earlier ones have written to the workspace alone.
    """

    def __init__(self, launchers: Sequence[Launcher], workspace: Callable[[Call], int]) -> None:
        super().__init__()
        self._launchers, self._workspace = tuple(launchers), workspace

    def pin(self, call: Call) -> Pinned:
        forms = [launcher.pin(call) for launcher in self._launchers]
        needed, device = max(1, self._workspace(call)), call.q.device

        def run(tensors: tuple[Any, ...]) -> None:
            # Freed when this returns, for what this stream does next: after the kernels.
            memory = torch.empty(needed, dtype=torch.uint8, device=device)
            address = memory.data_ptr()
            for form in forms:
                form(tensors, address)

        return run
