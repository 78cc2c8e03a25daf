"""What a chunk needs of its keys, queries and decays before the state comes in: the GDN form, one decay per head.

Throughout, ``X = n * value heads``, C tokens to the chunk (a power of two; padded tokens have g = 0, beta = 0,
k = 0), and ``D[t, s] = g_{s+1} + ... + g_t`` is the logarithm of the decay from token s to token t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["ChunkTerms", "gdn_terms"]


@dataclass(frozen=True, slots=True)
class ChunkTerms:
    """A chunk's factors; all in the compute dtype.

    Attributes:
        scores: ``[X, C, 2, C]``: for token t (first C) and s <= t, ``exp(D[t, s])`` times ``k_t . k_s`` (index 0)
            and ``q_t . k_s`` (index 1). Zero for s > t.
        reads: ``[X, C, 2, K]``: ``k_t`` and ``q_t``, decayed from the start of the chunk to t: what reads the state
            the chunk starts from.
        writes: ``[X, C, K]``: ``k_s`` decayed from s to the end of the chunk: what the state keeps of token s.
        total: ``[X, K, 1]`` or ``[X, 1, 1]``: decay of the state over the whole chunk.
    """

    scores: torch.Tensor
    reads: torch.Tensor
    writes: torch.Tensor
    total: torch.Tensor


def gdn_terms(kq: torch.Tensor, g: torch.Tensor) -> ChunkTerms:
    """Terms for ``kq [n * keys, C, 2, K]`` (keys and queries of a token side by side) and ``g [X, C]``.

    The segment sums D are sums over the segment itself, not differences of sums from the chunk's start: those
    would cancel where the decay is strong.
    """
    P, C, _, K = kq.shape
    X = g.shape[0]
    group = X // P
    later = torch.ones(C, C, dtype=torch.bool, device=g.device).tril_(-1)  # [r, s]: r > s
    between = torch.where(later, g[:, :, None], g.new_zeros(()))
    decay = torch.exp(between.cumsum(1)).tril()  # [X, t, s]
    products = torch.bmm(kq.view(P, 2 * C, K), kq[:, :, 0].transpose(1, 2)).view(P, 1, C, 2, C)
    since_start = torch.exp(g.cumsum(1))
    return ChunkTerms(
        scores=(products * decay.view(P, group, C, 1, C)).view(X, C, 2, C),
        reads=(kq.view(P, 1, C, 2, K) * since_start.view(P, group, C, 1, 1)).view(X, C, 2, K),
        writes=(kq[:, None, :, 0] * decay.view(P, group, C, C)[:, :, -1, :, None]).view(X, C, K),
        total=since_start[:, -1].view(X, 1, 1),
    )
