"""Typed accesses to raw global addresses, and 16-byte reads of shared memory, as LLVM IR.

Raw addresses keep Numba's array records (and the 100 us of unpacking tensors into them) out of the launch, give 64-bit
offsets everywhere, and let one access be 16 bytes wide whatever the element type.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

from .target import Function

__all__ = ["decode", "load", "load_index", "load_raw", "load_vector", "shared_quad", "store", "store_vector"]

_GLOBAL = 1
_F32 = ir.FloatType()
_F16 = ir.HalfType()
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


def _pointer(builder: Any, address: Any, to: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(to, addrspace=_GLOBAL))


def _widen(builder: Any, bits: Any, dtype: str) -> Any:
    """The float32 value of a bfloat16 or float16 held in an i16."""
    if dtype == "float16":
        return builder.fpext(builder.bitcast(bits, _F16), _F32)
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), _F32)


def _halves(builder: Any, word: Any, dtype: str) -> tuple[Any, Any]:
    """The float32 values of the two 16-bit floats in an i32, the lower one first."""
    if dtype == "float16":
        low, high = builder.trunc(word, _I16), builder.trunc(builder.lshr(word, _I32(16)), _I16)
        return _widen(builder, low, dtype), _widen(builder, high, dtype)
    low, high = builder.shl(word, _I32(16)), builder.and_(word, _I32(0xFFFF0000))
    return builder.bitcast(low, _F32), builder.bitcast(high, _F32)


def _narrow(builder: Any, value: Any, dtype: str) -> Any:
    """Round to nearest even; an i16."""
    kind = "bf16" if dtype == "bfloat16" else "f16"
    convert = ir.InlineAsm(ir.FunctionType(_I16, [_F32]), f"cvt.rn.{kind}.f32 $0, $1;", "=h,f", side_effect=False)
    return builder.call(convert, [value])


def _pack(builder: Any, low: Any, high: Any, dtype: str) -> Any:
    """Two values rounded to nearest even; an i32. The instruction takes the upper half first."""
    kind = "bf16x2" if dtype == "bfloat16" else "f16x2"
    convert = ir.InlineAsm(
        ir.FunctionType(_I32, [_F32, _F32]), f"cvt.rn.{kind}.f32 $0, $1, $2;", "=r,f,f", side_effect=False
    )
    return builder.call(convert, [high, low])


@cache
def load(dtype: str) -> Function:
    """``(address) -> float32``."""

    @intrinsic  # type: ignore[untyped-decorator]
    def load_one(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if dtype == "float32":
                return builder.load(_pointer(builder, args[0], _F32), align=4)
            return _widen(builder, builder.load(_pointer(builder, args[0], _I16), align=2), dtype)

        return types.float32(types.int64), codegen

    return load_one  # type: ignore[no-any-return]


@cache
def load_raw(dtype: str) -> Function:
    """``(address) -> uint32``: the bits alone, so that nothing waits for the load before ``decode`` does."""

    @intrinsic  # type: ignore[untyped-decorator]
    def load_bits(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if dtype == "float32":
                return builder.load(_pointer(builder, args[0], _I32), align=4)
            return builder.zext(builder.load(_pointer(builder, args[0], _I16), align=2), _I32)

        return types.uint32(types.int64), codegen

    return load_bits  # type: ignore[no-any-return]


@cache
def decode(dtype: str) -> Function:
    """``(uint32) -> float32``: what ``load_raw`` loaded."""

    @intrinsic  # type: ignore[untyped-decorator]
    def decode_bits(typingctx: Any, bits: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if dtype == "float32":
                return builder.bitcast(args[0], _F32)
            if dtype == "bfloat16":
                return builder.bitcast(builder.shl(args[0], _I32(16)), _F32)
            return _widen(builder, builder.trunc(args[0], _I16), dtype)

        return types.float32(types.uint32), codegen

    return decode_bits  # type: ignore[no-any-return]


@cache
def store(dtype: str) -> Function:
    """``(address, float32)``."""

    @intrinsic  # type: ignore[untyped-decorator]
    def store_one(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if dtype == "float32":
                builder.store(args[1], _pointer(builder, args[0], _F32), align=4)
            else:
                bits = _narrow(builder, args[1], dtype)
                builder.store(bits, _pointer(builder, args[0], _I16), align=2)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32), codegen

    return store_one  # type: ignore[no-any-return]


def _accesses(dtype: str, n: int) -> tuple[Any, int, int]:
    """Element type, elements per access, accesses: ``n`` values in accesses of at most 16 bytes."""
    words = n if dtype == "float32" else n // 2
    each = min(words, 4)
    return (_F32 if dtype == "float32" else _I32), each, words // each


@cache
def load_vector(dtype: str, n: int) -> Function:
    """``(address) -> n float32`` for n = 2, 4, 8."""
    element, each, count = _accesses(dtype, n)

    @intrinsic  # type: ignore[untyped-decorator]
    def load_many(typingctx: Any, address: Any) -> Any:
        result = types.UniTuple(types.float32, n)  # type: ignore[no-untyped-call]

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(element, each)
            values: list[Any] = []
            for i in range(count):
                address = builder.add(args[0], _I64(4 * each * i))
                vector = builder.load(_pointer(builder, address, kind), align=4 * each)
                words = [builder.extract_element(vector, _I32(x)) for x in range(each)]
                for word in words:
                    values += [word] if dtype == "float32" else _halves(builder, word, dtype)
            return context.make_tuple(builder, result, values)

        return result(types.int64), codegen

    return load_many  # type: ignore[no-any-return]


@cache
def store_vector(dtype: str, n: int) -> Function:
    """``(address, n float32)`` for n = 2, 4, 8."""
    element, each, count = _accesses(dtype, n)

    @intrinsic  # type: ignore[untyped-decorator]
    def store_many(typingctx: Any, address: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(element, each)
            parts = [builder.extract_value(args[1], x) for x in range(n)]
            if dtype != "float32":
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [_pack(builder, low, high, dtype) for low, high in pairs]
            for i in range(count):
                vector = ir.Constant(kind, ir.Undefined)
                for x in range(each):
                    vector = builder.insert_element(vector, parts[each * i + x], _I32(x))
                address = builder.add(args[0], _I64(4 * each * i))
                builder.store(vector, _pointer(builder, address, kind), align=4 * each)
            return context.get_dummy_value()

        many = types.UniTuple(types.float32, n)  # type: ignore[no-untyped-call]
        return types.void(types.int64, many), codegen

    return store_many  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def load_index(typingctx: Any, address: Any, wide: Any) -> Any:
    """``(address, wide) -> int64``: an int32, or an int64 where ``wide``; the branch is uniform over the grid."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.if_else(builder.icmp_signed("!=", args[1], _I64(0))) as (long, short):
            with long:
                wide = builder.load(_pointer(builder, args[0], _I64), align=8)
                wide_from = builder.block
            with short:
                narrow = builder.sext(builder.load(_pointer(builder, args[0], _I32), align=4), _I64)
                narrow_from = builder.block
        value = builder.phi(_I64)
        value.add_incoming(wide, wide_from)
        value.add_incoming(narrow, narrow_from)
        return value

    return types.int64(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def shared_quad(typingctx: Any, array: Any, at: Any) -> Any:
    """``(shared float32 array aligned to 16 bytes, at) -> 4 float32``; one 16-byte access."""
    result = types.UniTuple(types.float32, 4)  # type: ignore[no-untyped-call]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        kind = ir.VectorType(_F32, 4)
        vector = builder.load(builder.bitcast(builder.gep(data, [args[1]]), ir.PointerType(kind)), align=16)
        values = [builder.extract_element(vector, _I32(x)) for x in range(4)]
        return context.make_tuple(builder, result, values)

    return result(array, types.int64), codegen
