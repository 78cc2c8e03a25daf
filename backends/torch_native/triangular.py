"""The unit lower triangular system of a chunk, ``(I + A) U = R``."""

from __future__ import annotations

import torch

__all__ = ["solve_unit_lower", "unit_lower_inverse"]

#: Up to this order blocks are inverted; between blocks there is substitution.
_INVERTED = 32


def solve_unit_lower(A: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """``U [X, C, V]`` from ``A [X, C, C]``, of which only the part below the diagonal is read, and ``R``.

    Block forward substitution: ``U_i = T_i (R_i - sum_{j<i} A_ij U_j)`` with ``T_i`` the inverse of a diagonal
    block of order at most 32. The entries of ``T_i`` are ``-beta_t k_t^T (I - beta k k^T) ... k_s`` over the tokens
    between, at most 2 in size wherever the recurrence itself is stable, so multiplying by it loses nothing.
    ``R`` may be overwritten. C must be a power of two. Not differentiable.
    """
    C = A.shape[1]
    b = min(_INVERTED, C)
    inverses = unit_lower_inverse(A, b)
    if b == C:
        return torch.bmm(inverses[:, 0], R)
    for i in range(C // b):
        rows = slice(i * b, (i + 1) * b)
        right = torch.baddbmm(R[:, rows], A[:, rows, : i * b], R[:, : i * b], alpha=-1) if i else R[:, rows]
        R[:, rows] = torch.bmm(inverses[:, i], right)
    return R


def unit_lower_inverse(A: torch.Tensor, order: int) -> torch.Tensor:
    """Inverses ``[X, C / order, order, order]`` of the diagonal blocks of ``I + A``, by halves.

    ``[[L1, 0], [M, L2]]`` has the inverse ``[[T1, 0], [-T2 M T1, T2]]``; both factors are products of substitutions,
    never powers of ``A``. ``order`` is a power of two that divides C.
    """
    X, C, _ = A.shape
    T = A.new_ones(X * C, 1, 1)
    h = 1
    while h < order:
        m = C // (2 * h)
        pairs = A.view(X, m, 2 * h, m, 2 * h)
        below = pairs.diagonal(0, 1, 3)[:, h:, :h].permute(0, 3, 1, 2).reshape(X * m, h, h)
        grown = A.new_zeros(X * m, 2 * h, 2 * h)
        grown[:, :h, :h] = T[0::2]
        grown[:, h:, h:] = T[1::2]
        corner = below if h == 1 else torch.bmm(torch.bmm(T[1::2], below), T[0::2])
        torch.neg(corner, out=grown[:, h:, :h])
        T = grown
        h *= 2
    return T.view(X, C // order, order, order)
