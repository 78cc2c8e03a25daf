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

from .target import Function, quad_words

__all__ = [
    "decode",
    "decode_quad",
    "load",
    "load_index",
    "load_raw",
    "load_raw_quad",
    "load_vector",
    "pin",
    "read_one",
    "read_quad",
    "store",
    "store_vector",
    "write_quad",
]

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


def _element(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Where element ``at`` of an array (of registers, once everything is inlined, or shared) lives."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _words(builder: Any, address: Any, element: Any, each: int, streaming: bool) -> list[Any]:
    """``each`` elements of one access."""
    if not streaming:
        kind = ir.VectorType(element, each)
        vector = builder.load(_pointer(builder, address, kind), align=4 * each)
        return [builder.extract_element(vector, _I32(x)) for x in range(each)]
    letter = "f" if element == _F32 else "r"
    places = ", ".join(f"${x}" for x in range(each))
    many = f".v{each}" if each > 1 else ""
    given = f"{{{places}}}" if each > 1 else places
    results = ir.LiteralStructType([element] * each) if each > 1 else element
    text = f"ld.global.cs{many}.{'f32' if letter == 'f' else 'b32'} {given}, [${each}];"
    kind = ir.FunctionType(results, [_I64])
    constraints = ",".join([f"={letter}"] * each) + ",l"
    loaded = builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), [address])
    return [builder.extract_value(loaded, x) for x in range(each)] if each > 1 else [loaded]


def _put_words(builder: Any, address: Any, words: list[Any], streaming: bool) -> None:
    """One access."""
    each, element = len(words), words[0].type
    if not streaming:
        kind = ir.VectorType(element, each)
        vector = ir.Constant(kind, ir.Undefined)
        for x, word in enumerate(words):
            vector = builder.insert_element(vector, word, _I32(x))
        builder.store(vector, _pointer(builder, address, kind), align=4 * each)
        return
    letter = "f" if element == _F32 else "r"
    places = ", ".join(f"${x + 1}" for x in range(each))
    many = f".v{each}" if each > 1 else ""
    given = f"{{{places}}}" if each > 1 else places
    text = f"st.global.cs{many}.{'f32' if letter == 'f' else 'b32'} [$0], {given};"
    kind = ir.FunctionType(ir.VoidType(), [_I64] + [element] * each)
    constraints = ",".join(["l", *[letter] * each, "~{memory}"])
    builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), [address, *words])


@cache
def load_vector(dtype: str, n: int, streaming: bool) -> Function:
    """``(address, out, first, step)``: n = 2, 4, 8 values into ``out[first::step]``."""
    element, each, count = _accesses(dtype, n)

    @intrinsic  # type: ignore[untyped-decorator]
    def load_many(typingctx: Any, address: Any, out: Any, first: Any, step: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, out, first, step = args
            values: list[Any] = []
            for i in range(count):
                for word in _words(builder, builder.add(address, _I64(4 * each * i)), element, each, streaming):
                    values += [word] if dtype == "float32" else _halves(builder, word, dtype)
            for x, value in enumerate(values):
                at = builder.add(first, builder.mul(step, _I64(x)))
                builder.store(value, _element(context, builder, signature.args[1], out, at))
            return context.get_dummy_value()

        return types.void(types.int64, out, types.int64, types.int64), codegen

    return load_many  # type: ignore[no-any-return]


@cache
def store_vector(dtype: str, n: int, streaming: bool) -> Function:
    """``(address, values, first, step)``: the reverse, rounding to nearest even."""
    _, each, count = _accesses(dtype, n)

    @intrinsic  # type: ignore[untyped-decorator]
    def store_many(typingctx: Any, address: Any, values: Any, first: Any, step: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, values, first, step = args
            parts = []
            for x in range(n):
                at = builder.add(first, builder.mul(step, _I64(x)))
                parts.append(builder.load(_element(context, builder, signature.args[1], values, at)))
            if dtype != "float32":
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [_pack(builder, low, high, dtype) for low, high in pairs]
            for i in range(count):
                words = parts[each * i : each * (i + 1)]
                _put_words(builder, builder.add(address, _I64(4 * each * i)), words, streaming)
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64, types.int64), codegen

    return store_many  # type: ignore[no-any-return]


@cache
def load_raw_quad(dtype: str) -> Function:
    """``(address, inner, count, aligned, out, at)``: the bits of four neighbours into ``quad_words(dtype)`` elements.

    One access where ``aligned``; else one per element that exists, ``inner`` bytes apart, and 0 for the others.
    """
    words = quad_words(dtype)
    kind, size = (_I32, 4) if dtype == "float32" else (_I16, 2)

    def element(builder: Any, address: Any, inner: Any, count: Any, x: int) -> Any:
        before = builder.block
        with builder.if_then(builder.icmp_signed("<", _I64(x), count)):
            place = builder.add(address, builder.mul(inner, _I64(x)))
            loaded = builder.zext(builder.load(_pointer(builder, place, kind), align=size), _I32)
            inside = builder.block
        bits = builder.phi(_I32)
        bits.add_incoming(_I32(0), before)
        bits.add_incoming(loaded, inside)
        return bits

    @intrinsic  # type: ignore[untyped-decorator]
    def load_bits(typingctx: Any, address: Any, inner: Any, count: Any, aligned: Any, out: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, inner, count, aligned, out, at = args

            def put(found: list[Any]) -> None:
                for x, word in enumerate(found):
                    place = _element(context, builder, signature.args[4], out, builder.add(at, _I64(x)))
                    builder.store(word, place)

            with builder.if_else(aligned) as (together, apart):
                with together:
                    put(_words(builder, address, _I32, words, False))
                with apart:
                    bits = [element(builder, address, inner, count, x) for x in range(4)]
                    if words == 2:
                        pairs = zip(bits[::2], bits[1::2], strict=True)
                        bits = [builder.or_(low, builder.shl(high, _I32(16))) for low, high in pairs]
                    put(bits)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.boolean, out, types.int64), codegen

    return load_bits  # type: ignore[no-any-return]


@cache
def decode_quad(dtype: str) -> Function:
    """``(raw, at, out, first)``: the four values of what ``load_raw_quad`` loaded."""
    words = quad_words(dtype)

    @intrinsic  # type: ignore[untyped-decorator]
    def decode_bits(typingctx: Any, raw: Any, at: Any, out: Any, first: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            raw, at, out, first = args
            values: list[Any] = []
            for x in range(words):
                word = builder.load(_element(context, builder, signature.args[0], raw, builder.add(at, _I64(x))))
                values += [builder.bitcast(word, _F32)] if dtype == "float32" else _halves(builder, word, dtype)
            for x, value in enumerate(values):
                place = builder.add(first, _I64(x))
                builder.store(value, _element(context, builder, signature.args[2], out, place))
            return context.get_dummy_value()

        return types.void(raw, types.int64, out, types.int64), codegen

    return decode_bits  # type: ignore[no-any-return]


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


def _quad(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Pointer to four neighbours of a shared array that is aligned to 16 bytes."""
    place = _element(context, builder, kind, array, at)
    return builder.bitcast(place, ir.PointerType(ir.VectorType(_F32, 4)))


@intrinsic  # type: ignore[untyped-decorator]
def read_quad(typingctx: Any, array: Any, at: Any, out: Any, first: Any) -> Any:
    """``(shared float32 array, at, out, first)``: four values in one access; ``at`` is a multiple of four."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, out, first = args
        vector = builder.load(_quad(context, builder, signature.args[0], array, at), align=16)
        for x in range(4):
            place = _element(context, builder, signature.args[2], out, builder.add(first, _I64(x)))
            builder.store(builder.extract_element(vector, _I32(x)), place)
        return context.get_dummy_value()

    return types.void(array, types.int64, out, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def write_quad(typingctx: Any, array: Any, at: Any, values: Any, first: Any) -> Any:
    """``(shared float32 array, at, values, first)``: the reverse."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, values, first = args
        vector = ir.Constant(ir.VectorType(_F32, 4), ir.Undefined)
        for x in range(4):
            place = _element(context, builder, signature.args[2], values, builder.add(first, _I64(x)))
            vector = builder.insert_element(vector, builder.load(place), _I32(x))
        builder.store(vector, _quad(context, builder, signature.args[0], array, at), align=16)
        return context.get_dummy_value()

    return types.void(array, types.int64, values, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def read_one(typingctx: Any, array: Any, at: Any) -> Any:
    """``(shared float32 array, at) -> float32``, without Python's meaning of a negative index."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_element(context, builder, signature.args[0], args[0], args[1]), align=4)

    return types.float32(array, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def pin(typingctx: Any, value: Any) -> Any:
    """``(int64) -> int64``: the same, computed here and not where it is used: in the shadow of a load, say."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        move = ir.InlineAsm(ir.FunctionType(_I64, [_I64]), "mov.b64 $0, $1;", "=l,l", side_effect=True)
        return builder.call(move, [args[0]])

    return types.int64(types.int64), codegen
