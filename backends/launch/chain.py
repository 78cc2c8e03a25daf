"""Chain: a call as several kernels, one after another on one stream, over the same tensors and a workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...registry.ops.fused_sigmoid_gating.call import Call
from .launcher import Launcher, Runner
from .pinned import Prepared, Step

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

    def prepared(self, call: Call) -> Prepared:
        of_each = [launcher.prepared(call) for launcher in self._launchers]
        steps: list[Step] = []
        for step in (step for one in of_each for step in one.steps):
            if steps and steps[-1].order == step.order:
                steps[-1] = Step(step.order, steps[-1].launches + step.launches)
            else:
                steps.append(step)
        return Prepared(tuple(steps), max(1, self._workspace(call)), call.q.device, of_each[0].driver)
