"""The recurrence itself, token by token in float64, and that of the error bound (see ``reference``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .packing import settle

__all__ = ["accumulate_errors", "advance"]


def advance(
    h: torch.Tensor,
    sizes: Sequence[int],
    decay: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """Take every sequence through its next tokens, of which there are P in all; three operations a token.

    Args:
        h: ``[N, heads, K, V]`` states, left as they are after these tokens.
        sizes: how many sequences take each step: a prefix of the one before.
        decay, k, v, beta: ``[P, heads, K or 1 | K | V | 1]``.
        before: set to ``exp(g) S``, ``[P, heads, K, V]``. May be ``after`` itself, when nobody needs it.
        after: set to the new states, likewise.

    Returns ``v - d``, ``[P, heads, V]``, where ``d = (exp(g) S)^T k``.
    """
    heads, missed = h.shape[1], torch.empty_like(v)
    counts = [size * heads for size in sizes]
    columns = (decay.flatten(0, 1)[..., None], (beta * k).flatten(0, 1)[..., None])
    rows = (x.flatten(0, 1)[:, None] for x in (k, v, missed))
    states = (x.view(-1, *h.shape[2:]) for x in (before, after))
    decays, betas_k, ks, vs, misses, befores, afters = (torch.split(x, counts) for x in (*columns, *rows, *states))
    state = carried = h.view(-1, *h.shape[2:])
    for count, decay_t, beta_k, k_t, v_t, missed_t, decayed, new in zip(
        counts, decays, betas_k, ks, vs, misses, befores, afters, strict=True
    ):
        torch.mul(state if len(state) == count else state[:count], decay_t, out=decayed)
        torch.baddbmm(v_t, k_t, decayed, alpha=-1, out=missed_t)
        state = torch.addcmul(decayed, beta_k, missed_t, out=new)
    settle(carried, afters)
    return missed


def accumulate_errors(
    error: torch.Tensor, sizes: Sequence[int], growth: torch.Tensor, local: torch.Tensor
) -> torch.Tensor:
    """``E <- growth E + local``, token by token; ``error`` ``[N, heads, V]`` is left as it is after them.

    Args:
        growth, local: ``[P, heads, 1 | V]``.

    Returns the errors after every token, ``[P, heads, V]``.
    """
    errors = torch.empty_like(local)
    growths, locals_, afters = (torch.split(x, list(sizes)) for x in (growth, local, errors))
    now = error
    for growth_t, local_t, new in zip(growths, locals_, afters, strict=True):
        now = torch.addcmul(local_t, growth_t, now if len(now) == len(new) else now[: len(new)], out=new)
    settle(error, afters)
    return errors
