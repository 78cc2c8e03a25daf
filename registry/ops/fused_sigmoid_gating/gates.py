"""The gates of the recurrence, in any dtype: used by the float64 reference and by the torch backends."""

from __future__ import annotations

import torch

__all__ = ["beta_of", "log_decay", "normalise"]

#: Below this, log1p(exp(z)) equals exp(z) to within half a float64 ulp of 1e-16 relative; above, no overflow of
#: exp(A_log) can meet a zero softplus.
_TINY_ARGUMENT = -37.0
#: The same switch for float32: exp(-17) / 2 = 2e-8 is below 2**-24.
_TINY_ARGUMENT_F32 = -17.0


def log_decay(
    A_log: torch.Tensor,
    x: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    lower_bound: float | None,
) -> torch.Tensor:
    """``g``, the logarithm of the decay, from ``x = a + dt_bias``; A_log broadcasts against x.

    ``g = -exp(A_log) * softplus(x; beta, threshold)``, or ``g = lower_bound * sigmoid(exp(A_log) * x)``.
    softplus is ``log1p(exp(beta * x)) / beta`` up to the threshold on ``beta * x`` and ``x`` beyond it, evaluated
    as ``max(z, 0) + log1p(exp(-|z|))`` so that no threshold overflows; for very negative ``z = beta * x`` the
    product is formed in the exponent, ``exp(A_log + z) / beta``, so that a huge ``exp(A_log)`` never meets 0.
    """
    if lower_bound is not None:
        largest = torch.finfo(x.dtype).max
        return lower_bound * torch.sigmoid(torch.exp(A_log).clamp(max=largest) * x)
    z = softplus_beta * x
    tiny = _TINY_ARGUMENT if x.dtype is torch.float64 else _TINY_ARGUMENT_F32
    small = z < tiny
    # Both branches are made finite where they are not taken, so that no gradient is NaN.
    safe = torch.where(small, torch.zeros_like(z), z)
    softplus = safe.clamp(min=0) + torch.log1p(torch.exp(-safe.abs()))
    softplus = torch.where(safe > softplus_threshold, safe, softplus) / softplus_beta
    largest = torch.finfo(x.dtype).max
    usual = torch.exp(A_log).clamp(max=largest) * softplus
    in_exponent = torch.exp(A_log + torch.where(small, z, torch.full_like(z, tiny))) / softplus_beta
    return -torch.where(small, in_exponent, usual)


def beta_of(b: torch.Tensor, allow_neg_eigval: bool) -> torch.Tensor:
    """``sigmoid(b)``, or ``2 * sigmoid(b)`` where negative eigenvalues are allowed."""
    beta = torch.sigmoid(b)
    return 2 * beta if allow_neg_eigval else beta


def normalise(x: torch.Tensor) -> torch.Tensor:
    """``x / sqrt(sum(x * x) + 1e-6)`` over the last dimension: the epsilon inside, as the contract pins it."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)
