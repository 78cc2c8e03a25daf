"""bfloat16, float16 and float64 to and from float32, as vector code on their bits.

Encoding rounds to nearest, ties to even; overflow becomes infinite, subnormals are exact, a NaN stays a (quiet) NaN.
Only integer arithmetic and exact float32 products are used, so no CPU extension decides the result.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import F32, F64, I16, I32, constant, vector

__all__ = ["BFLOAT16", "CODES", "FLOAT16", "FLOAT32", "FLOAT64", "decode", "encode", "storage"]

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = 0, 1, 2, 3
#: dtype name to the code compiled functions branch on.
CODES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16, "float64": FLOAT64}


def storage(code: int) -> ir.Type:
    """The type one element has in memory."""
    return {FLOAT32: F32, BFLOAT16: I16, FLOAT16: I16, FLOAT64: F64}[code]


def decode(builder: ir.IRBuilder, value: ir.Value, code: int) -> ir.Value:
    """Stored element(s) to float32 (rounded to it from float64, exact otherwise)."""
    lanes = _lanes(value)
    if code == FLOAT32:
        return value
    if code == FLOAT64:
        return builder.fptrunc(value, vector(F32, lanes))
    integer, real = vector(I32, lanes), vector(F32, lanes)
    bits = builder.zext(value, integer)
    if code == BFLOAT16:
        return builder.bitcast(builder.shl(bits, constant(integer, 16)), real)
    return _decode_float16(builder, bits, integer, real)


def encode(builder: ir.IRBuilder, value: ir.Value, code: int) -> ir.Value:
    """float32 value(s) to what is stored."""
    if code == FLOAT32:
        return value
    lanes = _lanes(value)
    integer = vector(I32, lanes)
    bits = builder.bitcast(value, integer)
    chosen = _encode_bfloat16(builder, bits, integer) if code == BFLOAT16 else _encode_float16(builder, bits, integer)
    return builder.trunc(chosen, vector(I16, lanes))


def _lanes(value: ir.Value) -> int:
    return int(value.type.count) if isinstance(value.type, ir.VectorType) else 1


def _decode_float16(builder: ir.IRBuilder, bits: ir.Value, integer: ir.Type, real: ir.Type) -> ir.Value:
    """Exponent 0: mantissa * 2**-24; exponent 31: float32's own infinity or NaN; else the exponent moves by 112."""

    def bit(value: int) -> ir.Constant:
        return constant(integer, value)

    sign = builder.shl(builder.and_(bits, bit(0x8000)), bit(16))
    magnitude = builder.and_(bits, bit(0x7FFF))
    shifted = builder.shl(magnitude, bit(13))
    normal = builder.add(shifted, bit(112 << 23))
    special = builder.or_(shifted, bit(0xFF << 23))
    tiny = builder.bitcast(builder.fmul(builder.uitofp(magnitude, real), constant(real, 2.0**-24)), integer)
    usual = builder.select(builder.icmp_unsigned("<", magnitude, bit(0x0400)), tiny, normal)
    chosen = builder.select(builder.icmp_unsigned(">=", magnitude, bit(0x7C00)), special, usual)
    return builder.bitcast(builder.or_(chosen, sign), real)


def _encode_bfloat16(builder: ir.IRBuilder, bits: ir.Value, integer: ir.Type) -> ir.Value:
    def bit(value: int) -> ir.Constant:
        return constant(integer, value)

    upper = builder.lshr(bits, bit(16))
    rounded = builder.lshr(builder.add(bits, builder.add(bit(0x7FFF), builder.and_(upper, bit(1)))), bit(16))
    magnitude = builder.and_(bits, bit(0x7FFFFFFF))
    nan = builder.icmp_unsigned(">", magnitude, bit(0x7F800000))
    return builder.select(nan, builder.or_(upper, bit(0x40)), rounded)


def _encode_float16(builder: ir.IRBuilder, bits: ir.Value, integer: ir.Type) -> ir.Value:
    """Normal: round away 13 bits; below 2**-14: count units of 2**-24 by adding 2**23; from 65520 on: infinite."""
    real = vector(F32, _lanes(bits))

    def bit(value: int) -> ir.Constant:
        return constant(integer, value)

    sign = builder.and_(builder.lshr(bits, bit(16)), bit(0x8000))
    magnitude = builder.and_(bits, bit(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, bit(13)), bit(1))
    moved = builder.sub(builder.add(magnitude, builder.add(bit(0x0FFF), odd)), bit(112 << 23))
    normal = builder.lshr(moved, bit(13))
    units = builder.fmul(builder.bitcast(magnitude, real), constant(real, 2.0**24))
    counted = builder.fadd(units, constant(real, 2.0**23))
    tiny = builder.sub(builder.bitcast(counted, integer), bit(0x4B000000))
    chosen = builder.select(builder.icmp_unsigned("<", magnitude, bit(0x38800000)), tiny, normal)
    chosen = builder.select(builder.icmp_unsigned(">=", magnitude, bit(0x477FF000)), bit(0x7C00), chosen)
    quiet = builder.or_(builder.and_(builder.lshr(magnitude, bit(13)), bit(0x3FF)), bit(0x7E00))
    chosen = builder.select(builder.icmp_unsigned(">", magnitude, bit(0x7F800000)), quiet, chosen)
    return builder.or_(chosen, sign)
