"""A chunk's terms where every key channel has its own decay (KDA).

The decay between two tokens then sits inside the dot product, ``sum_i k_t[i] k_s[i] exp(D_i[t, s])``, and splitting
it as ``exp(G_t) * exp(-G_s)`` overflows. Instead the chunk is halved recursively: for t in the right half of a
segment and s in the left one, with m the boundary,

    exp(D[t, s]) = exp(g_m + ... + g_t) * exp(g_{s+1} + ... + g_{m-1}),

both factors at most 1, so each level is one batched product of scaled rows. Going up one level, the right half's
rows take on the decay of the left half and the left half's columns that of the right one. At the top the rows
carry the decay from the start of the chunk and the columns that to its end: exactly what reads and what feeds the
state. Only the tokens' own decays are exponentiated; every sum of g is a product of numbers at most 1.
"""

from __future__ import annotations

import torch

from .chunk_terms import ChunkTerms

__all__ = ["kda_terms"]


def kda_terms(kq: torch.Tensor, g: torch.Tensor) -> ChunkTerms:
    """Terms for ``kq [n * keys, C, 2, K]`` and ``g [X, C, K]``; differentiable."""
    P, C, _, K = kq.shape
    X = g.shape[0]
    wide = kq.unsqueeze(1).expand(P, X // P, C, 2, K).reshape(X, C, 2, K)
    columns = wide[:, :, 0].clone()  # k_s, decayed from s to the end of its segment
    decay = torch.exp(g)
    rows = wide * decay.unsqueeze(2)  # k_t and q_t, decayed from the start of their segment to t
    scores = g.new_zeros(X, C, 2, C)
    scores[:, :, 1].diagonal(0, 1, 2).copy_((wide[:, :, 1] * columns).sum(-1))
    in_place = not (torch.is_grad_enabled() and (g.requires_grad or kq.requires_grad))
    total = decay  # [X, segments, K]: the decay over each segment
    h = 1
    while h < C:
        m = C // (2 * h)
        rows, columns = rows.view(X, m, 2, h, 2, K), columns.view(X, m, 2, h, K)
        right = rows[:, :, 1].reshape(X * m, 2 * h, K) if not in_place else rows[:, :, 1].view(X * m, 2 * h, K)
        left = columns[:, :, 0].reshape(X * m, h, K) if not in_place else columns[:, :, 0].view(X * m, h, K)
        corner = torch.bmm(right, left.transpose(1, 2)).view(X, m, h, 2, h)
        pairs = scores.view(X, m, 2, h, 2, m, 2, h)[:, :, 1, :, :, :, 0].diagonal(0, 1, 4)  # [X, h, 2, h, m]
        pairs.copy_(corner.permute(0, 2, 3, 4, 1))
        total = total.view(X, m, 2, K)
        rows = _scale(rows, 1, total[:, :, 0, None, None], in_place)
        columns = _scale(columns, 0, total[:, :, 1, None], in_place)
        total = total[:, :, 0] * total[:, :, 1]
        h *= 2
    return ChunkTerms(scores, rows.view(X, C, 2, K), columns.view(X, C, K), total.view(X, K, 1))


def _scale(halves: torch.Tensor, which: int, factor: torch.Tensor, in_place: bool) -> torch.Tensor:
    """Multiply half ``which`` of ``halves [X, m, 2, h, ...]`` by ``factor``."""
    if in_place:
        halves[:, :, which].mul_(factor)
        return halves
    parts = list(halves.unbind(2))
    parts[which] = parts[which] * factor
    return torch.stack(parts, 2)
