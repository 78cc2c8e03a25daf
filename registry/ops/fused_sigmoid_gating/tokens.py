"""What the reference has to know of every token, in float64: q, k, v, decay, beta, and how far off evaluations are.

Errors are relative and in units of the roundoff ``u = 2**-24``: ``c_g`` of the decay, ``c_beta`` of beta, ``c_n`` of a
normalised vector (see ``reference``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .call import Call
from .gates import beta_of, log_decay, normalise

__all__ = ["F64", "Tokens", "on"]

F64 = torch.float64


@dataclass(frozen=True, slots=True)
class Tokens:
    """Per-token quantities for the chosen heads, float64, in the order of a ``Packing``.

    Attributes:
        q, k: ``[positions, heads, K]``, normalised and scaled; v: ``[positions, heads, V]``.
        decay, decay_error: ``[positions, heads, K or 1]``, and its ``c_g``.
        beta: ``[positions, heads, 1]``.
        k_gain: ``beta ||k||``: how much of an error of ``v - d`` reaches a column of the state.
        value_weight: ``k_gain (c_beta + 4 + 2 c_n)``: the roundings of ``u`` in units of ``|v| + |d|``.
        growth: how much an error of a column may grow in the step: ``max(exp g)`` and, where keys are not normalised,
            the norm of ``I - beta k k^T``.
        norm_error: ``c_n``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor
    decay_error: torch.Tensor
    beta: torch.Tensor
    k_gain: torch.Tensor
    value_weight: torch.Tensor
    growth: torch.Tensor
    norm_error: float

    @classmethod
    def of(cls, call: Call, heads: torch.Tensor, rows: torch.Tensor, chunk: int) -> Tokens:
        """Those in ``rows``; bounds of the decay for chunks of ``chunk`` tokens, 0 for token by token."""

        def of(tensor: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
            """``[B, T, heads, ...]`` to ``[positions, which, ...]``."""
            return on(tensor, rows.device).flatten(0, 1)[rows][:, which].to(F64)

        group = heads // (call.hv // call.h)
        q, k, v, a, b = of(call.q, group), of(call.k, group), of(call.v, heads), of(call.a, heads), of(call.b, heads)
        A_log, bias = (on(x, rows.device).to(F64)[heads] for x in (call.A_log, call.dt_bias))
        if call.is_kda:
            A_log = A_log[:, None]
        else:
            a, bias, A_log = a[..., None], bias[..., None], A_log[..., None]
        x = a + bias
        g = log_decay(A_log, x, call.softplus_beta, call.softplus_threshold, call.lower_bound)
        beta = beta_of(b, call.allow_neg_eigval)[..., None]
        beta_error = 4 + b[..., None].abs() * (1 - torch.sigmoid(b))[..., None]
        norm_error = 0.0
        if call.use_qk_l2norm:
            q, k = normalise(q), normalise(k)
            norm_error = 3 * math.sqrt(call.key_dim) + 5
        k_norm, decay = k.norm(dim=-1, keepdim=True), torch.exp(g)
        k_gain = beta * k_norm
        growth = decay.amax(-1, keepdim=True)
        if not call.use_qk_l2norm:
            growth = growth * torch.maximum(torch.ones_like(beta), (1 - beta * k_norm**2).abs())
        return cls(
            q=q * call.scale,
            k=k,
            v=v,
            decay=decay,
            decay_error=_decay_error(call, A_log, a, bias, x, g, chunk),
            beta=beta,
            k_gain=k_gain,
            value_weight=k_gain * (beta_error + 4 + 2 * norm_error),
            growth=growth,
            norm_error=norm_error,
        )


def on(tensor: torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    """A tensor that must be there, on ``device`` and without its gradient."""
    assert tensor is not None
    return tensor.detach().to(device)


def _decay_error(
    call: Call,
    A_log: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """Relative error of exp(g) in units of u: that of g (absolute), plus exp's own."""
    sum_error = a.abs() + bias.abs() + x.abs()  # rounding of a + dt_bias and of its product with beta
    scale = torch.exp(A_log)
    if call.lower_bound is not None:
        y = scale * x
        slope = abs(call.lower_bound) * torch.sigmoid(y) * torch.sigmoid(-y)
        g_error = slope * (y.abs() * (4 + A_log.abs()) + scale * sum_error) + 4 * g.abs()
        g_error = torch.where(slope == 0, 4 * g.abs(), g_error)
    else:
        g_error = g.abs() * (2 * (3 + A_log.abs()) + 1)
        g_error = g_error + scale * torch.sigmoid(call.softplus_beta * x) * sum_error
    if chunk:
        g_error = g_error + 6 * math.sqrt(chunk) * g.abs()  # decays between tokens are sums of g over the chunk
    return g_error + g.abs() + 2
