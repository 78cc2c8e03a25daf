"""The bound runner: from a Call to one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from .arguments import pack
from .specialization import Specialization

__all__ = ["Kernel", "Launcher"]

#: Blocks along the grid's y axis, which sequences are laid along; beyond, they go on along z.
_GRID_Y = 65535


class Kernel(Protocol):
    """A compiled kernel: ``cupy``'s function with torch's stream, or the CPU engine's."""

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: tuple[Any, ...], device: torch.device
    ) -> None:
        """Launch on ``device``."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """Runs one specialisation. Allocates nothing but an output that is not given; never waits for the device."""

    kernel: Kernel
    specialization: Specialization

    def __call__(self, call: Call) -> torch.Tensor:
        out = call.out
        if out is None:
            # Rows beyond the last offset belong to no sequence, and are not written.
            out = torch.empty(call.v.shape, dtype=call.q.dtype, device=call.q.device)
        n = call.n
        if n == 0 or call.q.shape[1] == 0:
            return out
        grid = (self.specialization.tiles * call.hv, min(n, _GRID_Y), -(-n // _GRID_Y))
        self.kernel(grid, (self.specialization.threads, 1, 1), (pack(call, out),), out.device)
        return out
