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

from .operands import OperandRounding

__all__ = ["U32", "Segments"]

#: Unit roundoff of float32.
U32 = 2.0**-24


class Segments:
    """The columns ``[B | M]`` of the current segment of every sequence. All tensors float64; N sequences, H heads.

    Attributes:
        h, error: ``[N, H, K, V + K]`` and per column ``[N, H, V + K]``; major, spread: like ``h``, see ``reference``.
    """

    def __init__(self, tokens: int, states: torch.Tensor, total: int, rounded: bool) -> None:
        n, heads, k, v = states.shape
        self.tokens = tokens
        self.h = states.new_zeros(n, heads, k, v + k)
        self.error = states.new_zeros(n, heads, v + k)
        self.major, self.spread = torch.zeros_like(self.h), torch.zeros_like(self.h)
        self._operands = OperandRounding(total, self.h) if rounded else None
        self._start = torch.zeros_like(states)
        self._start_error = states.new_zeros(n, heads, v)
        self._start_column, self._start_entries = torch.zeros_like(self._start_error), torch.zeros_like(states)

    @staticmethod
    def values(v: torch.Tensor, k_dim: int) -> torch.Tensor:
        """``[tokens, H, V]`` with zeros for the columns of ``M``."""
        return torch.cat((v, v.new_zeros(*v.shape[:-1], k_dim)), -1)

    def begin(self, live: int, h: torch.Tensor, error: torch.Tensor, operands: OperandRounding | None) -> None:
        """The first ``live`` sequences begin a segment from states ``h`` with these errors."""
        v = h.shape[-1]
        self.h[:live, :, :, :v] = 0
        self.h[:live, :, :, v:] = torch.eye(h.shape[-2], dtype=h.dtype, device=h.device)
        self.error[:live] = 0
        self._start[:live], self._start_error[:live] = h[:live], error[:live]
        if operands is not None and self._operands is not None:
            self._operands.column[:live] = 0
            self._operands.state[:live] = 0
            operands.shared[:live] = 0
            self._start_column[:live], self._start_entries[:live] = operands.column[:live], operands.state[:live]

    def begin_chunk(
        self,
        live: int,
        tokens: torch.Tensor,
        there: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> None:
        """Arguments as of :meth:`OperandRounding.add`, ``v`` as :meth:`values` gives it."""
        self.major[:live] = self.h[:live].abs()
        self.spread[:live] = 0
        if self._operands is not None:
            self._operands.add(tokens, there, self.h[:live], q, k, v, decay, beta)

    def join(self, count: int, h: torch.Tensor, error: torch.Tensor, operands: OperandRounding | None) -> None:
        """The first ``count`` sequences start their next segment from joined states: sets the errors of those."""
        if not count:
            return
        v, m = h.shape[-1], 6 * math.sqrt(h.shape[-2])
        passage, start = self.h[:count, :, :, v:], self._start[:count]
        own, unit = self.error[:count, :, :v], self.error[:count, :, v:]
        norm = torch.linalg.matrix_norm(passage, 2)[..., None]
        sums = passage.abs() @ start.abs()
        rounding = (m + 2) * sums.norm(dim=-2) + 2 * h[:count].norm(dim=-2)
        met = torch.einsum("nhkv,nhk->nhv", start.abs(), unit)
        error[:count] = norm * self._start_error[:count] + met + own + U32 * rounding
        if operands is None or self._operands is None:
            return
        column, entries, squares = self._operands.column[:count], self._operands.state[:count], start * start
        met = torch.einsum("nhkv,nhk->nhv", squares, column[..., v:])
        before = norm * norm * self._start_column[:count]
        joined = before + met + column[..., :v] + operands.shared[:count]
        operands.column[:count] = torch.maximum(operands.column[:count], joined)  # which holds those of whole ones
        before = (passage * passage) @ self._start_entries[:count]
        joined = before + entries[..., v:] @ squares + entries[..., :v]
        operands.state[:count] = torch.maximum(operands.state[:count], joined)
