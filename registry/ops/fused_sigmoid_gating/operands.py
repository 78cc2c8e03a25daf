"""What rounding the operands of matrix products to bfloat16 does to a chunked evaluation: how much, and how it spreads.

For one chunk and value head, with S the state at its start (``docs/performance/prefill.md`` has the form):

    R = V - exp(G) K S      U = T R      O = exp(G) Q S + P U      S' = exp(G_C) S + B^T U,   B = exp(G_C - G) K

An evaluation on tensor cores rounds S, R, U, B U (all per value column) and T, P, each entry by a factor 1 + d of its
own with |d| <= 2**-8, and forms sums of exact products in float32; k and q are exact, norms and decays are factors of
rows. To first order a result is off by a sum of those d, each times how the result depends on it:

    of          O depends as             S' depends as
    S           exp(G) Q - P W           B^T W              W = T exp(G) K, and times S
    R           P T                      B^T T              times R
    T           P, entry by entry        B^T                times T R, entry by entry
    U, P        P U each                 B^T U (of B U)

The d are independent and their mean is zero, so squares add: 2**-16 times the sum of the squares of these coefficients
is at least the variance, and by Hoeffding's inequality the error is beyond 6.5 times its root in fewer than one of
10**9 values. Errors of the state at a chunk's start add |exp(G) Q - P W| times their 2-norm, and the recurrence does
not amplify them (see ``reference``). What is typical is less: 2**-8 is reached by few roundings, their root mean square
is 0.43 of it, and an error of a state meets other entries of a row with either sign.
"""

from __future__ import annotations

import torch

from .local_errors import LEAST

__all__ = ["CERTAIN", "TYPICAL", "UNIT", "OperandRounding", "squared_norm"]

#: Largest relative error of rounding to bfloat16; the root mean square of it as a part; Hoeffding's factor for 1e-9.
UNIT = 2.0**-8
TYPICAL = 0.43
CERTAIN = 6.5


class OperandRounding:
    """The squares, chunk by chunk. All tensors float64; N sequences, h heads, V columns or more.

    Attributes:
        o, o_typical: ``[tokens, h, V]``: of the outputs, with errors of states that meet in the worst way, and in a
            typical one.
        column: ``[N, h, columns]``: of the current states, summed over K. state: ``[N, h, K, columns]``: entry by
            entry, typical.
        shared: ``[N, h, columns]``: the part of ``column`` that comes from T, whose roundings all columns share.
        tied: ``[3, N, h]``: of the sum of ``state`` over K and V, the part that comes from T; the most that one token
            has of it; and the sum of the squares of what each token has.
    """

    def __init__(self, tokens: int, states: torch.Tensor, width: int | None = None) -> None:
        """``states``: ``[N, h, K, columns]``, of which the first ``width`` have outputs (default: all)."""
        n, h, _, v = states.shape
        self.o = states.new_zeros(tokens, h, v if width is None else width)
        self.o_typical = torch.zeros_like(self.o)
        self.column, self.shared = states.new_zeros(n, h, v), states.new_zeros(n, h, v)
        self.state = torch.zeros_like(states)
        self.tied = states.new_zeros(3, n, h)

    def add(
        self,
        rows: torch.Tensor,
        live: torch.Tensor,
        start: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> None:
        """One chunk of C tokens of the first n sequences.

        Args:
            rows: ``[n, C]`` of the tokens; live: which of them there are.
            start: ``[n, h, K, columns]`` states at the chunk's start.
            q, k, v, decay, beta: ``[tokens, h, K | K | columns | 1 | 1]``, normalised and scaled.
        """
        n, count = rows.shape
        there = live[:, None, :, None]

        def of(x: torch.Tensor) -> torch.Tensor:  # [n, h, C, dim]
            return torch.where(there, x[rows].transpose(1, 2), 0.0)

        q, k, v, beta = of(q), of(k), of(v), of(beta)
        logs = torch.where(there, decay[rows].transpose(1, 2).log().clamp_min(LEAST), 0.0)[..., 0].cumsum(-1)
        past = torch.exp(logs[..., :, None] - logs[..., None, :]).tril()
        since = logs.exp()[..., None]
        system = torch.eye(count, dtype=q.dtype, device=q.device) + (beta * past * (k @ k.mT)).tril(-1)
        T = torch.linalg.solve_triangular(system, torch.diag_embed(beta[..., 0]), upper=False)
        P = past * (q @ k.mT)
        B = torch.exp(logs[..., -1:] - logs)[..., None] * k
        R = v - since * (k @ start)
        U = T @ R
        W = T @ (since * k)
        X = since * q - P @ W
        TR = _squares(T) @ _squares(R)

        width = self.o.shape[-1]
        squares_X, squares_start, squares_R, squares_U = (_squares(x) for x in (X, start, R, U))
        own = squares_X @ squares_start[..., :width] + _squares(P @ T) @ squares_R[..., :width]
        own = own + _squares(P) @ (TR + 2 * squares_U)[..., :width]
        before, typical = self.column[:n], self.state[:n]
        worst = own + squares_X.sum(-1, keepdim=True) * before[:, :, None, :width]
        self.o[rows[live]] = worst.transpose(1, 2)[live]
        self.o_typical[rows[live]] = (own + squares_X @ typical[..., :width]).transpose(1, 2)[live]

        squares_B = _squares(B).mT
        passage = B.mT @ W
        new = squares_B @ (TR + squares_U) + _squares(B.mT @ T) @ squares_R + _squares(passage) @ squares_start
        passed = since[..., -1:, :] * torch.eye(k.shape[-1], dtype=q.dtype, device=q.device) - passage
        gain = squared_norm(passed)[..., None]
        self.column[:n] = gain * before + new.sum(-2)
        self.shared[:n] = gain * self.shared[:n] + (squares_B @ TR).sum(-2)
        carried = _squares(passed) @ typical
        self._tie(n, squares_B.sum(-2) * TR[..., :width].sum(-1), typical[..., :width], carried[..., :width])
        self.state[:n] = carried + new

    def _tie(self, n: int, of_tokens: torch.Tensor, before: torch.Tensor, carried: torch.Tensor) -> None:
        """Of what tokens had before, as much is left as of all; ``of_tokens`` ``[n, h, C]`` is the chunk's."""
        left = carried.sum((-2, -1)) / before.sum((-2, -1)).clamp_min(torch.finfo(before.dtype).tiny)
        total, most, squares = self.tied[:, :n]
        self.tied[0, :n] = left * total + of_tokens.sum(-1)
        self.tied[1, :n] = torch.maximum(left * most, of_tokens.amax(-1))
        self.tied[2, :n] = left * left * squares + _squares(of_tokens).sum(-1)

    def scatter(self, columns: int) -> torch.Tensor:
        """``[3, N, h]``: how the errors of the first ``columns`` columns of the states may scatter together.

        What part of their squares comes from roundings that all columns share (of T), and of that the largest part of
        one token and the root of the sum of the squares of all tokens' parts.
        """
        tiny = torch.finfo(self.tied.dtype).tiny
        total, most, squares = self.tied
        part = total / self.state[..., :columns].sum((-2, -1)).clamp_min(tiny)
        return torch.stack((part, most / total.clamp_min(tiny), squares.sqrt() / total.clamp_min(tiny))).clamp(max=1.0)


def squared_norm(matrices: torch.Tensor) -> torch.Tensor:
    """``||M||^2`` of ``[..., K, K]`` by its eigenvalues, which takes less than its singular values."""
    largest: torch.Tensor = torch.linalg.eigvalsh(matrices @ matrices.mT)[..., -1]
    return largest.clamp_min(0)


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x * x
