"""exp, softplus and sigmoid as float64 vector code: relative error below 1e-13, no branch, no library call.

The gates need float32 accuracy in ``g``, which for strong decays is more than float32 arithmetic gives; in float64
the question does not arise, and eight lanes at a time it costs less than one scalar call of the C library.
"""

from __future__ import annotations

import math

from llvmlite import ir

from .emit import F64, I64, constant, fma, vector

__all__ = ["GATE_LANES", "exp", "log_decay", "rate", "sigmoid"]

#: float64 values per vector: one AVX-512 register.
GATE_LANES = 8
_REAL = vector(F64, GATE_LANES)
_INTEGER = vector(I64, GATE_LANES)

#: Adding this to |n| < 2**51 leaves n, rounded to an integer, in the low bits.
_ROUNDER = 1.5 * 2.0**52
_ROUNDER_BITS = 0x4338000000000000
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
#: Taylor terms of exp on |r| <= ln(2)/2: the first one left out is below 2e-16.
_EXP_TERMS = 13
#: Terms of 2 atanh(s), s <= 1/3: the first one left out is below 2e-15 of the sum.
_LOG_TERMS = 14
#: Below this, log1p(exp(z)) equals exp(z) to a rounding of float64.
_TINY_ARGUMENT = -37.0
_LARGEST = 1.7976931348623157e308


def real(value: float) -> ir.Constant:
    """``value`` in every lane."""
    return constant(_REAL, value)


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """``e**x``: infinite above 709.8, subnormal then 0 below -708.4; NaN stays NaN."""
    x = b.select(b.fcmp_ordered("<", x, real(-800.0)), real(-800.0), x)
    x = b.select(b.fcmp_ordered(">", x, real(800.0)), real(800.0), x)
    shifted = fma(b, x, real(1 / math.log(2)), real(_ROUNDER))
    n = b.fsub(shifted, real(_ROUNDER))
    r = fma(b, n, real(-_LN2_HIGH), x)
    r = fma(b, n, real(-_LN2_LOW), r)
    series = real(1 / math.factorial(_EXP_TERMS))
    for power in reversed(range(_EXP_TERMS)):
        series = fma(b, series, r, real(1 / math.factorial(power)))
    whole = b.sub(b.bitcast(shifted, _INTEGER), constant(_INTEGER, _ROUNDER_BITS))
    # 2**n in two factors, so that a result beyond the range of one exponent is reached, not wrapped around.
    half = b.ashr(whole, constant(_INTEGER, 1))
    return b.fmul(b.fmul(series, _power_of_two(b, half)), _power_of_two(b, b.sub(whole, half)))


def _power_of_two(b: ir.IRBuilder, n: ir.Value) -> ir.Value:
    biased = b.add(n, constant(_INTEGER, 1023))
    return b.bitcast(b.shl(biased, constant(_INTEGER, 52)), _REAL)


def _log1p(b: ir.IRBuilder, e: ir.Value) -> ir.Value:
    """``log(1 + e)`` for 0 <= e <= 1, as ``2 atanh(e / (2 + e))``: no cancellation however small e is."""
    s = b.fdiv(e, b.fadd(e, real(2.0)))
    square = b.fmul(s, s)
    series = real(1 / (2 * _LOG_TERMS - 1))
    for term in reversed(range(_LOG_TERMS - 1)):
        series = fma(b, series, square, real(1 / (2 * term + 1)))
    return b.fmul(b.fmul(real(2.0), s), series)


def sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """``1 / (1 + exp(-x))``; 0 where that underflows."""
    return b.fdiv(real(1.0), b.fadd(real(1.0), exp(b, b.fneg(x))))


def log_decay(b: ir.IRBuilder, x: ir.Value, A_log: ir.Value, beta: ir.Value, threshold: ir.Value) -> ir.Value:
    """``g = -exp(A_log) * softplus(x; beta, threshold)``, every argument a vector.

    For very negative ``z = beta * x`` the product is formed in the exponent, so that a huge ``exp(A_log)`` never
    meets a softplus of 0; elsewhere ``exp(A_log)`` is kept finite, so that it never meets one as infinity.
    """
    z = b.fmul(beta, x)
    small = b.fcmp_ordered("<", z, real(_TINY_ARGUMENT))
    negative = b.fcmp_ordered("<", z, real(0.0))
    magnitude = b.select(negative, z, b.fneg(z))  # -|z|
    softplus = b.fadd(b.select(negative, real(0.0), z), _log1p(b, exp(b, magnitude)))
    softplus = b.select(b.fcmp_ordered(">", z, threshold), z, softplus)
    usual = b.fmul(rate(b, A_log), softplus)
    in_exponent = exp(b, b.fadd(A_log, z))
    return b.fneg(b.fdiv(b.select(small, in_exponent, usual), beta))


def rate(b: ir.IRBuilder, A_log: ir.Value) -> ir.Value:
    """``exp(A_log)``, at most the largest finite number."""
    e = exp(b, A_log)
    return b.select(b.fcmp_ordered(">", e, real(_LARGEST)), real(_LARGEST), e)
