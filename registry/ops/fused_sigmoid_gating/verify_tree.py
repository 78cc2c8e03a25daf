"""Token-tree verification in the reference: a step starts from the stored state of its parent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .call import Call
from .dtypes import dtype_name, unit_roundoff
from .packing import Packing
from .tokens import F64

__all__ = ["VerifyTree"]


@dataclass(frozen=True, slots=True)
class VerifyTree:
    """Where steps start from, for the sequences in a packing's order.

    Attributes:
        parents: by sequence and step: the step whose state it starts from, negative for the sequence's start.
        chained: sequences for which nothing is stored, so that their steps follow one another.
        start: ``[N, heads, K, V]`` float64.
        dtype: of the buffer, where that rounds.
        steps, steps_bound: of the ``Reference`` in the making: the rows of earlier places are there.
    """

    packing: Packing
    parents: tuple[list[int], ...]
    chained: tuple[bool, ...]
    start: torch.Tensor
    dtype: torch.dtype | None
    steps: torch.Tensor
    steps_bound: torch.Tensor

    @classmethod
    def of(
        cls, call: Call, packing: Packing, start: torch.Tensor, steps: torch.Tensor, steps_bound: torch.Tensor
    ) -> VerifyTree:
        assert call.intermediates is not None
        assert call.parents is not None
        assert call.intermediate_rows is not None
        table = call.parents.tolist()
        rows = call.intermediate_rows.tolist()
        dtype = call.intermediates.dtype
        return cls(
            packing,
            tuple(table[i] for i in packing.order),
            tuple(rows[i] < 0 for i in packing.order),
            start,
            dtype if dtype in (torch.bfloat16, torch.float16) else None,
            steps,
            steps_bound,
        )

    def load_states(self, t: int, h: torch.Tensor) -> None:
        """Put every live sequence's parent state into the first V columns of ``h``. At place 0 nothing has a parent."""
        v = self.start.shape[-1]
        for i, row in self._parents(t):
            h[i, ..., :v] = self.start[i] if row is None else self._stored(row)

    def load_errors(self, t: int, error: torch.Tensor) -> None:
        """And its error into ``error``."""
        v = self.start.shape[-1]
        for i, row in self._parents(t):
            error[i, :, :v] = 0 if row is None else self.steps_bound[row]
            if row is not None and self.dtype is not None:
                # An evaluation's state may round to the neighbouring value: one whole ulp apart, per element.
                error[i, :, :v] += 2 * unit_roundoff(dtype_name(self.dtype)) * self._stored(row).norm(dim=-2)

    def _stored(self, row: int) -> torch.Tensor:
        """The state after the token in ``row``, as the buffer's dtype holds it."""
        return self.steps[row] if self.dtype is None else self.steps[row].to(self.dtype).to(F64)

    def _parents(self, t: int) -> list[tuple[int, int | None]]:
        """The sequences that do not go on from where they are, and the row of the parent's token if there is one."""
        found: list[tuple[int, int | None]] = []
        for i in range(self.packing.live(t) if t else 0):
            if not self.chained[i]:
                parent = self.parents[i][t]
                found.append((i, None if parent < 0 else self.packing.offsets[self.packing.order[i]] + parent))
        return found
