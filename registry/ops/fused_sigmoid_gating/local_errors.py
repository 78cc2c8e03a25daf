"""The errors that single tokens add, in float32: to a column of the state and to an output (see ``reference``).

Token by token, what the states before and after each token say, for a block of tokens at once.

In chunks, with the majorant of the state's parts instead. After token t of a chunk that starts from ``S`` it is

    M_t = P_t |S| + sum over s <= t of P_ts |k_s| |u_s|^T          P_ts = exp(g_{s+1} + .. + g_t), P_t from the start

and what the errors of the decays did to the parts so far is ``F_t``, the same sum with each part times ``C_ts``, the
sum of the ``c_g`` of its decays. The products of these sums with ``|k|`` and ``|q|`` need no ``M_t``: as in the
evaluations they are those of ``[C, K]`` with ``[K, V]`` for the start, of ``[C, C]`` with ``[C, V]`` for the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .packing import Rectangle
from .tokens import Tokens

__all__ = ["LEAST", "U32", "ChunkErrors", "chunk_errors", "token_errors"]

#: Unit roundoff of float32.
U32 = 2.0**-24
#: A log decay beyond this is no decay that float64 tells from zero.
LEAST = -700.0
#: Chunks are taken in pieces of so many tokens, with M and F handed on: their decays are looked at pair by pair. Less
#: where a token has K decays, and where those of all sequences and heads would be more than so many values.
_PIECE, _PIECE_OF_VECTORS, _TOGETHER = 64, 16, 1 << 24


def token_errors(
    tokens: Tokens, span: slice, missed: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of token-by-token evaluations, for the P tokens of ``span``.

    Args:
        missed: ``[P, heads, V]`` ``v - d``.
        before, after: ``[P, heads, K, V]`` ``exp(g) S`` and the new state. Overwritten.

    Returns what joins the error of the state, and what is added to an output's, both ``[P, heads, V]``.
    """
    k, v, q = tokens.k[span], tokens.v[span], tokens.q[span]
    m, c_n = 6 * math.sqrt(k.shape[-1]), tokens.norm_error
    shown = U32 * (m + c_n + 2) * _dot(q.abs(), after.abs_())
    magnitude = _dot(k.abs(), before.abs_())
    local = _norm_(before.mul_((tokens.decay_error[span] + 1)[..., None])) + 2 * _norm_(after)
    local = local + tokens.k_gain[span] * (m + 2 * c_n + 2) * magnitude
    return U32 * (local + tokens.value_weight[span] * _values(v, missed)), shown


def _dot(vectors: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """``[P, heads, K]`` and ``[P, heads, K, V]`` to ``[P, heads, V]``."""
    return (vectors[..., None, :] @ states).squeeze(-2)


def _values(v: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
    """``|v| + |d|``."""
    return v.abs() + torch.where(v.isfinite(), v - missed, 0.0).abs()


def _norm_(states: torch.Tensor) -> torch.Tensor:
    """Norms of the columns; squares the states in place, which is faster than ``norm`` over that axis."""
    return states.square_().sum(-2).sqrt_()


@dataclass(frozen=True, slots=True)
class ChunkErrors:
    """Of chunked evaluations, for a chunk of n sequences that has P tokens in all.

    Attributes:
        local: ``[P, heads, columns]``: joins the error of the state. shown: ``[P, heads, V]``: added to an output's.
        formed: ``[n, heads, columns]``: joins the error where the state is formed, at the end of the chunk or, for a
            sequence that ends inside it, of the sequence.
    """

    local: torch.Tensor
    shown: torch.Tensor
    formed: torch.Tensor


def chunk_errors(
    tokens: Tokens,
    span: slice,
    rectangle: Rectangle,
    v: torch.Tensor,
    missed: torch.Tensor,
    start: torch.Tensor,
    chunk: int,
) -> ChunkErrors:
    """Of chunks of ``chunk`` tokens, of which ``rectangle`` has those in ``span`` (some chunks end early).

    Args:
        v, missed: ``[P, heads, columns]`` values and ``v - d``.
        start: ``[n, heads, K, columns]`` the state at the start of the chunk. The first V columns have outputs.
    """
    n, heads, k_dim = start.shape[:3]
    c_n, sums, width = tokens.norm_error, 6 * math.sqrt(chunk), tokens.v.shape[-1]
    weight = 6 * math.sqrt(k_dim) + sums + 4 * c_n + 4
    decay, c_g = rectangle.of(tokens.decay, 1.0), rectangle.of(tokens.decay_error)
    c_g = torch.where((decay == 0) & c_g.isfinite(), 0.0, c_g)  # of nothing there is no error
    # One that is not finite makes its token's error so, and those after it; products must not lead it to those before.
    u = tokens.beta[span] * missed.abs()
    u = rectangle.of(torch.where(u.isfinite(), u, 0.0), before=span.start)
    most = math.isqrt(_TOGETHER // max(1, n * heads * decay.shape[-1]))
    piece = max(1, min(most, _PIECE if decay.shape[-1] == 1 else _PIECE_OF_VECTORS))
    inputs = (rectangle.of(tokens.k).abs(), rectangle.of(tokens.q).abs(), decay, c_g, u)
    major, spread = start.abs().flatten(0, 1), None  # M, and F, of which there is none yet
    of_state, of_output = [], []
    for k, q, decay, c_g, u in zip(*(torch.split(x, piece, 1) for x in inputs), strict=True):
        past = _Past.of(decay, c_g)
        from_start = past.since * (past.c_since + weight)
        from_k, from_q = (from_start * k) @ major, (from_start * q) @ major[..., :width]
        if spread is not None:
            from_k += (past.since * k) @ spread
            from_q += (past.since * q) @ spread[..., :width]
        among_k, among_q = past.products(k, q, weight)
        of_state.append(among_k.tril(-1) @ u + from_k)
        of_output.append(among_q.tril() @ u[..., :width] + from_q)
        major, spread = past.passed(k, u, major, spread)
    assert spread is not None
    value_error = tokens.value_weight[span] * _values(v, missed)
    return ChunkErrors(
        local=U32 * (tokens.k_gain[span] * rectangle.packed(torch.cat(of_state, 1)) + value_error),
        shown=U32 * rectangle.packed(torch.cat(of_output, 1)),
        formed=U32 * (spread + (sums + 2 * c_n + 4) * major).norm(dim=-2).view(n, heads, -1),
    )


@dataclass(frozen=True, slots=True)
class _Past:
    """The decays before the C tokens of B pieces: ``P`` and the sums ``C`` of their errors.

    Attributes:
        since, c_since: ``[B, C, K or 1]`` from the start of the piece.
        between, c_between: ``[B, C, C, K or 1]`` from after token s to t, at ``[:, t, s]``; of no meaning for s > t.
    """

    since: torch.Tensor
    c_since: torch.Tensor
    between: torch.Tensor
    c_between: torch.Tensor

    @classmethod
    def of(cls, decay: torch.Tensor, c_g: torch.Tensor) -> _Past:
        logs, c_since = decay.log().clamp_min(LEAST).cumsum(1), c_g.cumsum(1)
        between = (logs[:, :, None] - logs[:, None]).exp_()
        return cls(logs.exp(), c_since, between, c_since[:, :, None] - c_since[:, None])

    def products(self, k: torch.Tensor, q: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, t, s]``: of ``|k_t|``, and of ``|q_t|``, with ``P_ts (C_ts + weight) |k_s|``."""
        between = (self.c_between + weight).mul_(self.between)
        if between.shape[-1] == 1:
            return between[..., 0] * (k @ k.mT), between[..., 0] * (q @ k.mT)
        of_k, of_q = (between.mul_(k[:, None]) @ torch.stack((k, q), -1)).unbind(-1)
        return of_k, of_q

    def passed(
        self, k: torch.Tensor, u: torch.Tensor, major: torch.Tensor, spread: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``M`` and ``F`` after the piece."""
        since, c_since = (x[:, -1, :, None] for x in (self.since, self.c_since))
        last, major = self.between[:, -1] * k, since * major
        added = (self.c_between[:, -1] * last).mT @ u + c_since * major
        return major + last.mT @ u, added if spread is None else since * spread + added
