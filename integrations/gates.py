"""Decays and betas that are computed already, turned back into the op's raw inputs.

The op computes ``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = 2 * sigmoid(b)`` (with ``allow_neg_eigval``).
With A_log = dt_bias = 0 these have inverses:

    a = log(exp(y) - 1) = y + log(-expm1(-y)),  y = -g        b = logit(beta / 2)

evaluated in float32 (float64 for float64 inputs). What that costs, with u = 2**-24: ``a`` carries an error of about
``2 |a| u``, which reaches g multiplied by ``sigmoid(a) = 1 - exp(-y)``; so g changes by at most
``|g| (2 max(1, |log y|) + 4) u`` and beta by ``(2 |b| + 4) u`` of itself: about what the op's own evaluation of its
gates is allowed, and less than the rounding of gates that come in bfloat16 (2**-9). Gates that are still raw are better
handed over raw.

Decays above 1 (g > 0) and betas outside of [0, 2] have no inverse and become NaN, as would the results. The ends are
moved to where the arithmetic is finite and no float32 result changes but by underflow: ``1e-30 <= y <= 120``,
``2e-30 <= beta <= 2 - 2**-23``; gradients there are those of the place moved to, so a decay of exactly 1 has its own.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["raw_beta", "raw_decay"]

_SMALLEST = 1e-30
_LARGEST_DECAY = 120.0
_LARGEST_HALF_BETA = 1 - 2.0**-24


def raw_decay(g: torch.Tensor) -> torch.Tensor:
    """``a`` of g's shape, so that ``-softplus(a) == g``; float32, or float64 for float64. Differentiable."""
    made: torch.Tensor = _RawDecay.apply(_wide(g))  # type: ignore[no-untyped-call]
    return made


def raw_beta(beta: torch.Tensor) -> torch.Tensor:
    """``b`` of beta's shape, so that ``2 * sigmoid(b) == beta``; float32, or float64 for float64. Differentiable."""
    made: torch.Tensor = _RawBeta.apply(_wide(beta))  # type: ignore[no-untyped-call]
    return made


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.to(torch.float32)


class _RawDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        # NaN stays NaN, and so becomes what is below zero.
        y = torch.where(g > 0, torch.nan, (-g).clamp(_SMALLEST, _LARGEST_DECAY))
        ctx.save_for_backward(y)
        # Where y is large the second term vanishes; where it is small the first one does.
        return y + torch.log(-torch.expm1(-y))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        found: torch.Tensor = grads[0] / torch.expm1(-y)
        return found


class _RawBeta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, beta: torch.Tensor) -> torch.Tensor:
        half = beta / 2
        half = torch.where((half < 0) | (half > 1), torch.nan, half.clamp(_SMALLEST, _LARGEST_HALF_BETA))
        ctx.save_for_backward(half)
        return torch.log(half) - torch.log1p(-half)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (half,) = ctx.saved_tensors
        found: torch.Tensor = grads[0] / (2 * half * (1 - half))
        return found
