"""From a call to a launch of the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ...errors import BackendFailedError
from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .arguments import constants, integers, pointers, reals, tiles
from .kernel import recurrent

__all__ = ["Launcher"]


@dataclass(frozen=True, slots=True)
class Launcher:
    """A bound runner: takes a :class:`Call`, writes ``call.out``, the pool and the intermediate states.

    Triton compiles at the first launch with new properties of the arguments: a dtype, a stride of 1, a stride or an
    address divisible by 16. Lengths, their number and slots never compile anything.

    Attributes:
        problem, config: what it was bound to; for error messages.
        tiles: programs per (sequence, value head).
        warps: warps per program.
        constants: the kernel's compile-time arguments.
    """

    problem: Problem
    config: Config
    tiles: int
    warps: int
    constants: Mapping[str, int | bool]

    @classmethod
    def of(cls, problem: Problem, config: Config) -> Launcher:
        return cls(problem, config, tiles(problem, config), int(config["warps"]), constants(problem, config))

    def __call__(self, call: Call) -> torch.Tensor:
        """Raises BackendFailedError if the kernel does not compile or launch; nothing is written then."""
        out = call.out
        if out is None:
            out = torch.empty(call.v.shape, dtype=call.q.dtype, device=call.q.device)
        n = call.n
        if n == 0 or call.q.shape[1] == 0:
            return out
        grid = (n * call.hv * self.tiles,)
        try:
            with _on(out.device):
                recurrent[grid](
                    *pointers(call, out),
                    *reals(call),
                    *integers(call, out),
                    **self.constants,
                    num_warps=self.warps,
                    num_stages=1,
                    enable_fp_fusion=False,
                )
        except (CompilationError, PTXASError, OutOfResources) as error:
            raise self._failed("compile", error) from error
        except RuntimeError as error:  # how Triton passes on what the driver says
            raise self._failed("launch", error) from error
        return out

    def _failed(self, stage: str, error: Exception) -> BackendFailedError:
        return BackendFailedError(
            "fused_sigmoid_gating", "triton", self.config.label, self.problem.label, stage, str(error)
        )


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
