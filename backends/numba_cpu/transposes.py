"""Tiles stored as ``[V, K]``: blocks of 16 x 16 turned over in registers on their way in and out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llvmlite import ir

from .emit import F32, I32, I64, LANES, choose, load, operation, pointer, store, vector
from .formats import CODES, FLOAT64, decode, encode, storage

__all__ = ["transpose_in", "transpose_out"]


@operation("void", "i64", "i64", "i64", "i64", "i64")
def transpose_in(
    b: ir.IRBuilder, target: ir.Value, stride: ir.Value, source: ir.Value, source_stride: ir.Value, code: ir.Value
) -> None:
    """``transpose_in(target, stride, source, source_stride, code)``: ``target[i, j] = decoded source[j, i]``, 16 x 16.

    Both have unit stride along their rows; the strides given are those between rows, in elements.
    """
    target = pointer(b, target, F32)

    def of_code(kind: int) -> None:
        base = pointer(b, source, storage(kind))
        rows = [load(b, base, b.mul(source_stride, I64(j)), LANES) for j in range(LANES)]
        for i, row in enumerate(_turned(b, [decode(b, r, kind) for r in rows])):
            store(b, row, target, b.mul(stride, I64(i)))

    choose(b, code, {kind: partial(of_code, kind) for kind in CODES.values() if kind != FLOAT64})


@operation("void", "i64", "i64", "i64", "i64", "i64")
def transpose_out(
    b: ir.IRBuilder, target: ir.Value, target_stride: ir.Value, source: ir.Value, stride: ir.Value, code: ir.Value
) -> None:
    """``transpose_out(target, target_stride, source, stride, code)``: ``target[j, i] = encoded source[i, j]``."""
    source = pointer(b, source, F32)

    def of_code(kind: int) -> None:
        base = pointer(b, target, storage(kind))
        rows = [load(b, source, b.mul(stride, I64(i)), LANES) for i in range(LANES)]
        for j, row in enumerate(_turned(b, rows)):
            store(b, encode(b, row, kind), base, b.mul(target_stride, I64(j)))

    choose(b, code, {kind: partial(of_code, kind) for kind in CODES.values() if kind != FLOAT64})


def _turned(b: ir.IRBuilder, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """The transpose of 16 vectors of 16: row i and row i + 8 interleaved, four times over (a perfect shuffle)."""
    now = list(rows)
    low = [lane // 2 + (LANES if lane % 2 else 0) for lane in range(LANES)]
    high = [index + LANES // 2 for index in low]
    masks = [ir.Constant(vector(I32), [I32(index) for index in mask]) for mask in (low, high)]
    for _ in range(LANES.bit_length() - 1):
        pairs = [(now[i], now[i + LANES // 2]) for i in range(LANES // 2)]
        now = [b.shuffle_vector(x, y, mask) for x, y in pairs for mask in masks]
    return now
