"""The gates of one token in float32, as Triton functions: decay and beta.

The kernels are compiled without contraction (``enable_fp_fusion=False``): a product and a sum are one ``fma`` only
where the source says so, and a value's bits do not depend on what the compiler chose to fuse.
"""

# The body of a Triton function is Triton's language: types are inferred, tuples grow by +, and a test of a constant
# stands alone, so that what it excludes is never compiled.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["beta_of", "decay_of", "log_decay_of"]

#: Largest finite float32: keeps ``exp(A_log)`` finite, so that it never meets a zero as ``inf * 0``.
LARGEST = tl.constexpr(3.4028234663852886e38)
#: Below this softplus is exp(z) to half an ulp, and the product with exp(A_log) is formed in the exponent.
TINY = tl.constexpr(-17.0)


@triton.jit
def _sigmoid(x):
    """``1 / (1 + exp(-x))``: 0 and 1 exactly where the exponential over- or underflows."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _log1p_of_exp(y):
    """``log1p(exp(y))`` for ``y <= 0``, within 4 units of 2**-24 for every y, without a logarithm.

    ``log1p(e) = 2 atanh(s)`` with ``s = e / (2 + e) <= 1/3``; ``2 atanh(s) / s`` is a polynomial in ``z = s * s``,
    fitted on [0, 1/9] to 0.07 units of 2**-24. Nothing is lost where e is tiny: the result is then 2 s.
    """
    e = tl.exp(y)
    s = e / (2.0 + e)
    z = s * s
    p = z * 0.28178541598723333 + 0.2796043257552567
    p = p * z + 0.4002493441019591
    p = p * z + 0.6666631363880039
    p = p * z + 2.0
    return s * p


@triton.jit
def log_decay_of(a, dt_bias, A_log, softplus_beta, softplus_threshold, lower_bound, BOUNDED: tl.constexpr):
    """``g``, the logarithm of what the state decays by; for scalars, or for vectors over K with a scalar A_log.

    ``g = -exp(A_log) * softplus(a + dt_bias)``, or ``g = lower_bound * sigmoid(exp(A_log) * (a + dt_bias))``.
    """
    x = a + dt_bias
    scale = tl.minimum(tl.exp(A_log), LARGEST)
    if BOUNDED:
        g = lower_bound * _sigmoid(scale * x)
    else:
        z = softplus_beta * x
        softplus = tl.maximum(z, 0.0) + _log1p_of_exp(-tl.abs(z))
        softplus = tl.where(z > softplus_threshold, z, softplus)
        g = -tl.where(z < TINY, tl.exp(A_log + z), scale * softplus) / softplus_beta
    return g


@triton.jit
def decay_of(a, dt_bias, A_log, softplus_beta, softplus_threshold, lower_bound, BOUNDED: tl.constexpr):
    """``exp(g)`` of :func:`log_decay_of`: the factor the state decays by."""
    return tl.exp(log_decay_of(a, dt_bias, A_log, softplus_beta, softplus_threshold, lower_bound, BOUNDED))


@triton.jit
def beta_of(b, NEG_EIGVAL: tl.constexpr):
    """``sigmoid(b)``, twice that where negative eigenvalues are allowed."""
    beta = _sigmoid(b)
    if NEG_EIGVAL:
        beta = 2.0 * beta
    return beta
