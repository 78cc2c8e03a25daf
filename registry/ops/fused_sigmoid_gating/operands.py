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

__all__ = ["CERTAIN", "TYPICAL", "UNIT", "OperandRounding"]

#: Largest relative error of rounding to bfloat16; the root mean square of it as a part; Hoeffding's factor for 1e-9.
UNIT = 2.0**-8
TYPICAL = 0.43
CERTAIN = 6.5
#: A log decay beyond this is no decay that float64 tells from zero.
_LEAST = -700.0


class OperandRounding:
    """The squares, chunk by chunk. All tensors float64; N sequences, h heads.

    Attributes:
        o, o_typical: ``[tokens, h, V]``: of the outputs, with errors of states that meet in the worst way, and in a
            typical one.
        column: ``[N, h, V]``: of the current states, summed over K. state: ``[N, h, K, V]``: entry by entry, typical.
        shared: ``[N, h, V]``: the part of ``column`` that comes from T, whose roundings all columns share.
    """

    def __init__(self, tokens: int, states: torch.Tensor) -> None:
        n, h, _, v = states.shape
        self.o = states.new_zeros(tokens, h, v)
        self.o_typical = torch.zeros_like(self.o)
        self.column, self.shared = states.new_zeros(n, h, v), states.new_zeros(n, h, v)
        self.state = torch.zeros_like(states)

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
            start: ``[n, h, K, V]`` states at the chunk's start.
            q, k, v, decay, beta: ``[tokens, h, K | K | V | 1 | 1]``, normalised and scaled.
        """
        n, count = rows.shape
        there = live[:, None, :, None]

        def of(x: torch.Tensor) -> torch.Tensor:  # [n, h, C, dim]
            return torch.where(there, x[rows].transpose(1, 2), 0.0)

        q, k, v, beta = of(q), of(k), of(v), of(beta)
        logs = torch.where(there, decay[rows].transpose(1, 2).log().clamp_min(_LEAST), 0.0)[..., 0].cumsum(-1)
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

        own = _squares(X) @ _squares(start) + _squares(P @ T) @ _squares(R)
        own = own + _squares(P) @ (TR + 2 * _squares(U))
        before, typical = self.column[:n], self.state[:n]
        worst = own + _squares(X).sum(-1, keepdim=True) * before[:, :, None, :]
        self.o[rows[live]] = worst.transpose(1, 2)[live]
        self.o_typical[rows[live]] = (own + _squares(X) @ typical).transpose(1, 2)[live]

        new = _squares(B).mT @ (TR + _squares(U)) + _squares(B.mT @ T) @ _squares(R)
        new = new + _squares(B.mT @ W) @ _squares(start)
        total = since[..., -1:, :]
        passed = total * torch.eye(k.shape[-1], dtype=q.dtype, device=q.device) - B.mT @ W
        norm = torch.linalg.matrix_norm(passed, 2)[..., None]
        self.column[:n] = _squares(norm) * before + new.sum(-2)
        self.shared[:n] = _squares(norm) * self.shared[:n] + (_squares(B).mT @ TR).sum(-2)
        self.state[:n] = _squares(passed) @ typical + new


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x * x
