"""The gates of one token in float32, as device functions: the same forms as the op's own ``gates.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32

from .target import Function, Target
from .variant import Variant

__all__ = ["beta_function", "decay_function", "growth_function"]

#: Below this, log1p(exp(z)) is exp(z) to half a float32 ulp.
_TINY_ARGUMENT = np.float32(-17.0)
_LARGEST = np.finfo(np.float32).max
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_ZERO = np.float32(0.0)


def _sigmoid(target: Target) -> Function:
    exp, divide = target.exp, target.divide

    @target.value
    def sigmoid(x: Any) -> Any:
        small = exp(-abs(x))
        over = _ONE if x >= _ZERO else small
        return divide(over, _ONE + small)

    return sigmoid


def growth_function(target: Target) -> Function:
    """``A_log -> exp(A_log)``, finite: an infinity would meet a zero softplus and give NaN."""
    exp = target.exp

    @target.value
    def growth(A_log: Any) -> Any:
        return min(exp(A_log), _LARGEST)

    return growth


def decay_function(variant: Variant, target: Target) -> Function:
    """``(x, A_log, growth, softplus_beta, softplus_threshold, lower_bound) -> exp(g)`` with ``x = a + dt_bias``."""
    exp, log1p, divide = target.exp, target.log1p, target.divide
    sigmoid = _sigmoid(target)

    @target.value
    def bounded(x: Any, A_log: Any, growth: Any, softplus_beta: Any, softplus_threshold: Any, lower_bound: Any) -> Any:
        return exp(lower_bound * sigmoid(growth * x))

    @target.value
    def usual(x: Any, A_log: Any, growth: Any, softplus_beta: Any, softplus_threshold: Any, lower_bound: Any) -> Any:
        z = softplus_beta * x
        if z < _TINY_ARGUMENT:
            # In the exponent, so that a huge exp(A_log) never meets a softplus rounded to 0.
            rate = divide(exp(A_log + z), softplus_beta)
        else:
            softplus = z if z > softplus_threshold else max(z, _ZERO) + log1p(exp(-abs(z)))
            rate = growth * divide(softplus, softplus_beta)
        return exp(-rate)

    return bounded if variant.bounded else usual


def beta_function(variant: Variant, target: Target) -> Function:
    """``b -> sigmoid(b)``, or ``2 * sigmoid(b)`` where negative eigenvalues are allowed."""
    sigmoid = _sigmoid(target)

    @target.value
    def beta(b: Any) -> Any:
        return float32(sigmoid(b))

    @target.value
    def twice(b: Any) -> Any:
        return float32(_TWO * sigmoid(b))

    return twice if variant.neg_eigval else beta
