"""Operations on one row of numbers: conversion, the norm, the gates. Addresses of float32 unless said otherwise.

Staged rows are padded to a multiple of 16; operations marked *padded* work on whole vectors and may write the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llvmlite import ir

from . import elementary
from .elementary import GATE_LANES
from .emit import (
    F32,
    F64,
    I32,
    I64,
    LANES,
    choose,
    constant,
    fma,
    load,
    operation,
    pointer,
    repeat,
    splat,
    store,
    vector,
)
from .formats import CODES, FLOAT64, decode, encode, storage

__all__ = [
    "bounded_decay_row",
    "decay_row",
    "decode_row",
    "encode_row",
    "fill_row",
    "multiply_row",
    "read_index",
    "read_number",
    "scale_row",
    "sigmoid_row",
    "sum_of_squares",
    "take_ticket",
]


@operation("void", "i64", "i64", "i64", "i64", "i64")
def decode_row(
    b: ir.IRBuilder, target: ir.Value, source: ir.Value, stride: ir.Value, count: ir.Value, code: ir.Value
) -> None:
    """``decode_row(target, source, stride, count, code)``: stored elements, ``stride`` apart, to a float32 row."""
    target = pointer(b, target, F32)

    def of_code(kind: int) -> None:
        base = pointer(b, source, storage(kind))

        def block(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            store(b, decode(b, load(b, base, i, LANES), kind), target, i)
            return []

        def one(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            store(b, decode(b, load(b, base, b.mul(i, stride)), kind), target, i)
            return []

        blocks = _whole_blocks(b, count, stride)
        repeat(b, blocks, [], block, step=LANES)
        repeat(b, count, [], one, start=blocks)

    choose(b, code, {kind: partial(of_code, kind) for kind in CODES.values()})


@operation("void", "i64", "i64", "i64", "i64", "i64")
def encode_row(
    b: ir.IRBuilder, target: ir.Value, stride: ir.Value, source: ir.Value, count: ir.Value, code: ir.Value
) -> None:
    """``encode_row(target, stride, source, count, code)``: a float32 row to stored elements, ``stride`` apart."""
    source = pointer(b, source, F32)

    def of_code(kind: int) -> None:
        base = pointer(b, target, storage(kind))

        def block(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            store(b, encode(b, load(b, source, i, LANES), kind), base, i)
            return []

        def one(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            store(b, encode(b, load(b, source, i), kind), base, b.mul(i, stride))
            return []

        blocks = _whole_blocks(b, count, stride)
        repeat(b, blocks, [], block, step=LANES)
        repeat(b, count, [], one, start=blocks)

    choose(b, code, {kind: partial(of_code, kind) for kind in CODES.values() if kind != FLOAT64})


def _whole_blocks(b: ir.IRBuilder, count: ir.Value, stride: ir.Value) -> ir.Value:
    """Elements that can be moved a vector at a time: whole vectors of a row without gaps."""
    return b.select(b.icmp_signed("==", stride, I64(1)), b.and_(count, I64(-LANES)), I64(0))


@operation("void", "i64", "i64", "i64", "f32")
def fill_row(b: ir.IRBuilder, target: ir.Value, start: ir.Value, count: ir.Value, value: ir.Value) -> None:
    """``fill_row(target, start, count, value)``: elements ``start`` to ``count`` become ``value``."""
    target = pointer(b, target, F32)

    def one(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        store(b, value, target, i)
        return []

    repeat(b, count, [], one, start=start)


@operation("f64", "i64", "i64")
def sum_of_squares(b: ir.IRBuilder, row: ir.Value, count: ir.Value) -> ir.Value:
    """``sum_of_squares(row, count)`` in float64, padded: 16 partial sums, added pairwise, whatever the CPU."""
    row = pointer(b, row, F32)
    wide = vector(F64, LANES)

    def block(i: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
        x = b.fpext(load(b, row, i, LANES), wide)
        return [fma(b, x, x, sums[0])]

    (partial_sums,) = repeat(b, count, [constant(wide, 0.0)], block, step=LANES)
    terms = [b.extract_element(partial_sums, I32(lane)) for lane in range(LANES)]
    while len(terms) > 1:
        terms = [b.fadd(x, y) for x, y in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


@operation("void", "i64", "i64", "f64")
def scale_row(b: ir.IRBuilder, row: ir.Value, count: ir.Value, factor: ir.Value) -> None:
    """``scale_row(row, count, factor)``: in place, the product formed in float64 and rounded once; padded."""
    row = pointer(b, row, F32)
    factors = splat(b, factor)

    def block(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        product = b.fmul(b.fpext(load(b, row, i, LANES), vector(F64, LANES)), factors)
        store(b, b.fptrunc(product, vector(F32)), row, i)
        return []

    repeat(b, count, [], block, step=LANES)


@operation("void", "i64", "i64", "i64", "i64")
def multiply_row(b: ir.IRBuilder, target: ir.Value, x: ir.Value, y: ir.Value, count: ir.Value) -> None:
    """``multiply_row(target, x, y, count)``: ``target[i] = x[i] * y[i]``; padded."""
    target, x, y = (pointer(b, a, F32) for a in (target, x, y))

    def block(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        store(b, b.fmul(load(b, x, i, LANES), load(b, y, i, LANES)), target, i)
        return []

    repeat(b, count, [], block, step=LANES)


@operation("void", "i64", "i64", "i64", "f64", "f64", "f64")
def decay_row(
    b: ir.IRBuilder,
    a: ir.Value,
    bias: ir.Value,
    count: ir.Value,
    A_log: ir.Value,
    beta: ir.Value,
    threshold: ir.Value,
) -> None:
    """``decay_row(a, bias, count, A_log, beta, threshold)``: a becomes ``exp(g)`` of ``x = a + bias``; padded."""
    A_log, beta, threshold = (splat(b, x, GATE_LANES) for x in (A_log, beta, threshold))
    _gate(b, a, bias, count, lambda x: elementary.exp(b, elementary.log_decay(b, x, A_log, beta, threshold)))


@operation("void", "i64", "i64", "i64", "f64", "f64")
def bounded_decay_row(
    b: ir.IRBuilder, a: ir.Value, bias: ir.Value, count: ir.Value, A_log: ir.Value, lower_bound: ir.Value
) -> None:
    """``bounded_decay_row(a, bias, count, A_log, lower_bound)``: the same, g bounded below; padded."""
    rate = elementary.rate(b, splat(b, A_log, GATE_LANES))
    lowest = splat(b, lower_bound, GATE_LANES)
    _gate(b, a, bias, count, lambda x: elementary.exp(b, b.fmul(lowest, elementary.sigmoid(b, b.fmul(rate, x)))))


@operation("void", "i64", "i64", "f64")
def sigmoid_row(b: ir.IRBuilder, row: ir.Value, count: ir.Value, factor: ir.Value) -> None:
    """``sigmoid_row(row, count, factor)``: x becomes ``factor * sigmoid(x)``; padded."""
    factors = splat(b, factor, GATE_LANES)
    _gate(b, row, None, count, lambda x: b.fmul(factors, elementary.sigmoid(b, x)))


def _gate(
    b: ir.IRBuilder, row: ir.Value, bias: ir.Value | None, count: ir.Value, function: Callable[[ir.Value], ir.Value]
) -> None:
    """``row[i] = function(row[i] + bias[i])``, in float64, in place."""
    row = pointer(b, row, F32)
    bias = None if bias is None else pointer(b, bias, F32)

    def read(source: ir.Value, i: ir.Value) -> ir.Value:
        return b.fpext(load(b, source, i, GATE_LANES), vector(F64, GATE_LANES))

    def block(i: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        x = read(row, i) if bias is None else b.fadd(read(row, i), read(bias, i))
        store(b, b.fptrunc(function(x), vector(F32, GATE_LANES)), row, i)
        return []

    repeat(b, count, [], block, step=GATE_LANES)


@operation("f32", "i64")
def read_number(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """``read_number(address)``: the float32 there."""
    return load(b, pointer(b, address, F32), I64(0))


@operation("i64", "i64", "i64", "i64")
def read_index(b: ir.IRBuilder, address: ir.Value, position: ir.Value, size: ir.Value) -> ir.Value:
    """``read_index(address, position, size)``: the int32 (size 4) or int64 (size 8) number ``position``."""
    place = b.add(address, b.mul(position, size))
    # An int64 is two int32 halves; the upper one is only read where it exists.
    words = pointer(b, place, I32)
    low = load(b, words, I64(0))
    wide = b.icmp_signed("==", size, I64(8))
    high = load(b, words, b.select(wide, I64(1), I64(0)))
    joined = b.or_(b.zext(low, I64), b.shl(b.zext(high, I64), I64(32)))
    return b.select(wide, joined, b.sext(low, I64))


@operation("i64", "i64")
def take_ticket(b: ir.IRBuilder, counter: ir.Value) -> ir.Value:
    """``take_ticket(counter)``: the int64 there, which grows by one, atomically."""
    return b.atomic_rmw("add", pointer(b, counter, I64), I64(1), "monotonic")
