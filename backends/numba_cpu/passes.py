"""The two passes over a tile of the state, ``[K, width]`` float32: where the time goes.

``dot``     reads the tile:  d = S^T w.
``update``  reads and writes it, one token:  S <- decay * S + k u^T,  o = S^T q,  and, fused, the next token's d.

Rows are taken in order and each column's sums run over k one fused multiply-add after the other. A column therefore
has the same bits in a tile of any width, alone or in a batch, in place or in scratch, fused or not. u and the sums
live in registers for the whole pass (two or three vectors per 16 columns), which is why this is IR: an accumulator
array in a Numba loop is loaded and stored on every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from .emit import F32, I64, LANES, choose, constant, fma, load, operation, pointer, repeat, splat, store, vector

__all__ = ["FUSED", "WIDTHS", "dot", "update"]

#: Tile widths there is code for.
WIDTHS = (16, 32, 64, 128)
#: Added to the width given to ``update``: compute the next token's d as well.
FUSED = 1

_ZERO = constant(vector(F32), 0.0)


def _columns(width: int) -> list[ir.Constant]:
    return [I64(c) for c in range(0, width, LANES)]


@operation("void", "i64", "i64", "i64", "i64", "i64", "i64")
def dot(
    b: ir.IRBuilder,
    width: ir.Value,
    tile: ir.Value,
    stride: ir.Value,
    weights: ir.Value,
    rows: ir.Value,
    delta: ir.Value,
) -> None:
    """``dot(width, tile, stride, weights, rows, delta)``: ``delta[c] = sum over r of tile[r, c] * weights[r]``.

    tile, weights and delta are addresses of float32; stride is that of the tile's rows, in elements.
    """
    tile, weights, delta = (pointer(b, x, F32) for x in (tile, weights, delta))

    def of_width(columns: Sequence[ir.Constant]) -> None:
        def row(i: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            weight = splat(b, load(b, weights, i))
            at = b.mul(i, stride)
            states = [load(b, tile, b.add(at, c), LANES) for c in columns]
            return [fma(b, s, weight, d) for s, d in zip(states, sums, strict=True)]

        for c, d in zip(columns, repeat(b, rows, [_ZERO] * len(columns), row), strict=True):
            store(b, d, delta, c)

    choose(b, width, {w: partial(of_width, _columns(w)) for w in WIDTHS})


@dataclass(frozen=True, slots=True)
class _Step:
    """Pointers and values of one token's update, all float32."""

    source: ir.Value
    source_stride: ir.Value
    target: ir.Value
    target_stride: ir.Value
    decay: ir.Value
    key: ir.Value
    query: ir.Value
    following: ir.Value
    beta: ir.Value
    value: ir.Value
    delta: ir.Value
    rows: ir.Value

    def emit(self, b: ir.IRBuilder, width: int, fused: bool) -> None:
        columns = _columns(width)
        n = len(columns)
        u = [b.fmul(self.beta, b.fsub(load(b, self.value, c, LANES), load(b, self.delta, c, LANES))) for c in columns]

        def row(i: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            decay, key, query = (splat(b, load(b, x, i)) for x in (self.decay, self.key, self.query))
            read, write = b.mul(i, self.source_stride), b.mul(i, self.target_stride)
            states = [b.fmul(decay, load(b, self.source, b.add(read, c), LANES)) for c in columns]
            states = [fma(b, key, u[j], s) for j, s in enumerate(states)]
            for c, s in zip(columns, states, strict=True):
                store(b, s, self.target, b.add(write, c))
            new = [fma(b, s, query, o) for s, o in zip(states, sums[:n], strict=True)]
            if fused:
                following = splat(b, load(b, self.following, i))
                new += [fma(b, s, following, d) for s, d in zip(states, sums[n:], strict=True)]
            return new

        sums = repeat(b, self.rows, [_ZERO] * (2 * n if fused else n), row)
        for c, o in zip(columns, sums[:n], strict=True):
            store(b, o, self.value, c)
        for c, d in zip(columns, sums[n:], strict=False):
            store(b, d, self.delta, c)


@operation("void", "i64", "i64", "i64", "i64", "i64", "i64", "i64", "i64", "i64", "f32", "i64", "i64", "i64")
def update(
    b: ir.IRBuilder,
    which: ir.Value,
    source: ir.Value,
    source_stride: ir.Value,
    target: ir.Value,
    target_stride: ir.Value,
    decay: ir.Value,
    key: ir.Value,
    query: ir.Value,
    following: ir.Value,
    beta: ir.Value,
    value: ir.Value,
    delta: ir.Value,
    rows: ir.Value,
) -> None:
    """``update(width [+ FUSED], source, stride, target, stride, decay, k, q, following, beta, value, delta, rows)``.

    One token on one tile; source and target may be the same memory. decay, k, q and following are rows of K;
    ``value[c]`` holds v on entry and o on return; ``delta[c]`` holds ``(decay * S)^T k`` on entry and, when fused,
    ``S^T following`` of the new state on return.
    """
    source, target, decay, key, query, following, value, delta = (
        pointer(b, x, F32) for x in (source, target, decay, key, query, following, value, delta)
    )
    step = _Step(
        source=source,
        source_stride=source_stride,
        target=target,
        target_stride=target_stride,
        decay=decay,
        key=key,
        query=query,
        following=following,
        beta=splat(b, beta),
        value=value,
        delta=delta,
        rows=rows,
    )
    cases = {w + (FUSED if fused else 0): partial(step.emit, b, w, fused) for w in WIDTHS for fused in (False, True)}
    choose(b, which, cases)
