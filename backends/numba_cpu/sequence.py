"""One task: one sequence, one value head, a span of columns of V, from its first token to its last."""

from __future__ import annotations

from . import parameters as at
from .emit import inlined, jit
from .parameters import Integers, Reals
from .passes import FUSED, dot, update
from .rows import read_index, read_number
from .staging import DECAY, DECAYED_KEY, KEY, QUERY, ROWS, element, stage, write_outputs
from .tiles import is_place, item_size, load_tile, store_tile

__all__ = ["bounds", "run_task"]


@jit
def bounds(p: Integers, n: int) -> tuple[int, int, int]:
    """Batch row, first token in it, and length of sequence ``n``."""
    if p[at.CU_SEQLENS] == 0:
        return n, 0, p[at.LENGTH]
    first = read_index(p[at.CU_SEQLENS], n, p[at.CU_SEQLENS + 1])
    return 0, first, read_index(p[at.CU_SEQLENS], n + 1, p[at.CU_SEQLENS + 1]) - first


@inlined
def run_task(p: Integers, r: Reals, n: int, head: int, v_low: int, scratch: int) -> None:
    """Compute outputs, final state and stored steps of columns ``v_low`` to ``v_low + V_SPAN``."""
    batch, first, length = bounds(p, n)
    v_count = min(p[at.V_SPAN], p[at.VALUE_DIM] - v_low)
    chunk = p[at.CHUNK]
    for start in range(0, length, chunk):
        count = min(chunk, length - start)
        stage(p, r, batch, first + start, count, head, v_low, v_count, scratch)
        column = 0
        while column < v_count:
            # The widest tile that fits; what is left below the narrowest is padded in scratch.
            width = p[at.V_TILE]
            while width > 16 and column + width > v_count:
                width //= 2
            valid = min(width, v_count - column)
            _walk(p, n, head, v_low + column, column, width, valid, start, count, length, scratch)
            column += width
        write_outputs(p, batch, first + start, count, head, v_low, v_count, scratch)


@jit
def _slot(p: Integers, index: int, n: int) -> int:
    slot: int = -1 if p[index] == 0 else read_index(p[index], n, p[index + 1])
    return slot


@jit
def _step_address(p: Integers, row: int, step: int, head: int, v: int) -> int:
    """Address of column ``v`` of a stored intermediate state."""
    return element(p, at.STEPS, row, step, head) + v * p[at.STEPS + at.STRIDES + 4] * item_size(p[at.STEPS + at.CODE])


@jit
def _pool_address(p: Integers, slot: int, head: int, v: int) -> int:
    """Address of column ``v`` of a slot's state; 0 without one: the sequence starts from zero."""
    if slot < 0:
        return 0
    return element(p, at.POOL, slot, head, 0) + v * p[at.POOL + at.STRIDES + 3] * item_size(p[at.POOL + at.CODE])


@inlined
def _walk(
    p: Integers,
    n: int,
    head: int,
    v: int,
    column: int,
    width: int,
    valid: int,
    start: int,
    count: int,
    length: int,
    scratch: int,
) -> None:
    """Take one tile through the staged tokens ``start`` to ``start + count`` of sequence ``n``.

    Every token reads the state where it is (pool, intermediate states or scratch) and writes it where it is needed
    next, so float32 states in ``kv`` layout are never copied for their own sake.
    """
    dim, row = p[at.KEY_DIM], p[at.ROW]
    delta = scratch + p[at.DELTA]
    # A sequence of several chunks keeps all its tiles; one of a single chunk reuses the same cache lines.
    tile = scratch + p[at.TILE] + (4 * dim * column if length > p[at.CHUNK] else 0)

    pool_code, pool_k, pool_v = p[at.POOL + at.CODE], p[at.POOL + at.STRIDES + 2], p[at.POOL + at.STRIDES + 3]
    pool_is_place = is_place(pool_code, pool_v, width, valid)
    origin = _pool_address(p, _slot(p, at.READ, n), head, v)
    final = _pool_address(p, _slot(p, at.WRITE, n), head, v)

    steps_code, steps_k, steps_v = p[at.STEPS + at.CODE], p[at.STEPS + at.STRIDES + 3], p[at.STEPS + at.STRIDES + 4]
    steps_are_places = is_place(steps_code, steps_v, width, valid)
    kept = _slot(p, at.ROWS, n)
    tree = kept >= 0 and p[at.PARENTS] != 0

    source, stride = tile, width
    if start > 0 and kept >= 0 and steps_are_places:
        source, stride = _step_address(p, kept, start - 1, head, v), steps_k
    ready = False  # delta holds this token's (decay * S)^T k
    for i in range(count):
        step = start + i
        parent = step - 1
        if tree and step > 0:
            place = p[at.PARENTS] + n * p[at.PARENTS + 2] * p[at.PARENTS + 1]
            parent = read_index(place, step * p[at.PARENTS + 3], p[at.PARENTS + 1])
        if step == 0 or parent < 0:
            if origin != 0 and pool_is_place:
                source, stride = origin, pool_k
            else:
                load_tile(tile, width, origin, pool_code, pool_k, pool_v, dim, valid)
                source, stride = tile, width
        elif tree:
            address = _step_address(p, kept, parent, head, v)
            if steps_are_places:
                source, stride = address, steps_k
            else:
                load_tile(tile, width, address, steps_code, steps_k, steps_v, dim, valid)
                source, stride = tile, width

        stepped = _step_address(p, kept, step, head, v) if kept >= 0 else 0
        finished = final if step + 1 == length else 0
        target, target_stride = tile, width
        if stepped != 0 and steps_are_places:
            target, target_stride = stepped, steps_k
        elif finished != 0 and pool_is_place:
            target, target_stride = finished, pool_k

        rows = scratch + i * ROWS * row
        if not ready:
            dot(width, source, stride, rows + DECAYED_KEY * row, dim, delta)
        ready = i + 1 < count and not tree
        update(
            width + (FUSED if ready else 0),
            source,
            stride,
            target,
            target_stride,
            rows + DECAY * row,
            rows + KEY * row,
            rows + QUERY * row,
            rows + (ROWS + DECAYED_KEY) * row,
            read_number(scratch + p[at.BETAS] + 4 * i),
            scratch + p[at.VALUES] + i * p[at.VALUE_ROW] + 4 * column,
            delta,
            dim,
        )
        source, stride = target, target_stride
        if stepped not in (0, target):
            store_tile(stepped, steps_code, steps_k, steps_v, target, target_stride, dim, valid)
        if finished not in (0, target):
            store_tile(finished, pool_code, pool_k, pool_v, target, target_stride, dim, valid)
