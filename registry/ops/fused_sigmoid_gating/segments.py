"""The error bound of evaluations that cut a sequence into segments and find what each does to the state by itself.

What a segment does to a state is affine: ``S' = M S + B``, with ``B`` what it makes of no state, and column j of ``M``
what it makes of the unit vector j where all values are zero. An evaluation finds ``B`` and ``M`` of all segments at
once, as columns beside one another of one recurrence that starts from ``[0 | I]``; then the states that segments start
from, one after another; then every segment again, as a sequence of its own.

So the recurrence's bound holds for the columns of ``B`` and ``M`` (errors ``E_B``, ``E_M``, see ``reference``), and for
a segment's tokens with the error ``E`` of the state ``S`` it starts from. Between them, for a column ``s`` of ``S``,

    E' <= ||M|| E + sum_j |s_j| E_M[j] + E_B + u [ (m + 2) || |M| |s| || + 2 ||s'|| ],      m = 6 sqrt(K)

With rounded operands (``operands``) squares add: ``||M||^2`` times those of ``s``, those of ``B``, and those of column
j of ``M`` times ``s_j^2``. The roundings of a chunk's matrix T are the same for all columns, which may all err the same
way: what they do to the state as it really is, counted once more, bounds that.

A sequence may be left whole all the same (by a backend that cuts some of a batch), so the bound holds for both. In
float32 it does as it is: ``S' = M S + B`` whoever forms it, and rounding what is made of a sum of columns costs at most
the sum of what rounding each costs. Squares do not add like that: where columns reinforce each other, one rounding of
their sum is more than roundings of each that are independent. There the larger of the two squares counts.
"""

from __future__ import annotations

import math

import torch

from .local_errors import U32
from .operands import OperandRounding, squared_norm

__all__ = ["Segments"]


class Segments:
    """The columns ``[S | B | M]``, of N sequences: the state as it is and its current segment's, side by side.

    Attributes:
        tokens: of a segment.
        h: ``[N, H, K, V + V + K]`` float64, the columns that the recurrence takes through the tokens.
    """

    def __init__(self, tokens: int, states: torch.Tensor) -> None:
        n, heads, k, self._v = states.shape
        self.tokens = tokens
        self.h = torch.cat((states, states.new_zeros(n, heads, k, self._v + k)), -1)
        self._start, self._start_entries = torch.zeros_like(states), torch.zeros_like(states)
        self._start_error = states.new_zeros(n, heads, self._v)
        self._start_column = torch.zeros_like(self._start_error)

    @staticmethod
    def values(v: torch.Tensor, k_dim: int) -> torch.Tensor:
        """``[tokens, H, V]`` for the columns of ``S`` and of ``B``, with zeros for those of ``M``."""
        return torch.cat((v, v, v.new_zeros(*v.shape[:-1], k_dim)), -1)

    def begin(self, live: int, error: torch.Tensor, operands: OperandRounding | None) -> None:
        """The first ``live`` sequences begin a segment from the states they have, with these errors."""
        v, h = self._v, self.h[:live]
        h[..., v : 2 * v] = 0
        h[..., 2 * v :] = torch.eye(h.shape[-2], dtype=h.dtype, device=h.device)
        error[:live, :, v:] = 0
        self._start[:live], self._start_error[:live] = h[..., :v], error[:live, :, :v]
        if operands is not None:
            operands.column[:live, :, v:] = 0
            operands.state[:live, ..., v:] = 0
            operands.shared[:live] = 0
            self._start_column[:live] = operands.column[:live, :, :v]
            self._start_entries[:live] = operands.state[:live, ..., :v]

    def join(self, count: int, error: torch.Tensor, operands: OperandRounding | None) -> None:
        """The first ``count`` sequences start their next segment from joined states: sets the errors of those."""
        if not count:
            return
        v, h, m = self._v, self.h[:count], 6 * math.sqrt(self.h.shape[-2])
        state, passage, start = h[..., :v], h[..., 2 * v :], self._start[:count]
        own, unit = error[:count, :, v : 2 * v], error[:count, :, 2 * v :]
        gain = squared_norm(passage)[..., None]
        sums = passage.abs() @ start.abs()
        rounding = (m + 2) * sums.norm(dim=-2) + 2 * state.norm(dim=-2)
        met = torch.einsum("nhkv,nhk->nhv", start.abs(), unit)
        error[:count, :, :v] = gain.sqrt() * self._start_error[:count] + met + own + U32 * rounding
        if operands is None:
            return
        column, entries, squares = operands.column[:count], operands.state[:count], start * start
        met = torch.einsum("nhkv,nhk->nhv", squares, column[..., 2 * v :])
        before = gain * self._start_column[:count]
        joined = before + met + column[..., v : 2 * v] + operands.shared[:count, :, :v]
        # The larger of the two, since a sequence may be whole.
        column[..., :v] = torch.maximum(column[..., :v], joined)
        before = (passage * passage) @ self._start_entries[:count]
        joined = before + entries[..., 2 * v :] @ squares + entries[..., v : 2 * v]
        whole = entries[..., :v].sum((-2, -1))
        entries[..., :v] = torch.maximum(entries[..., :v], joined)
        more = entries[..., :v].sum((-2, -1)) / whole.clamp_min(torch.finfo(whole.dtype).tiny)
        operands.tied[:, :count] *= torch.stack((more, more, more * more))  # of what there is more, as large a part
