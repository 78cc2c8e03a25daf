"""Tiles of a stored state: found where they lie, or brought to scratch and back through dtype and layout.

A *place* is a float32 tile with unit stride along V: an address and the stride of its rows. float32 states in ``kv``
layout are such places themselves and are worked on where they are; everything else goes through a scratch tile.
"""

from __future__ import annotations

from .emit import LANES, jit
from .formats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from .rows import decode_row, encode_row, fill_row
from .transposes import transpose_in, transpose_out

__all__ = ["is_place", "item_size", "load_tile", "store_tile"]


@jit
def item_size(code: int) -> int:
    """Bytes per element of a dtype code."""
    if code in (BFLOAT16, FLOAT16):
        return 2
    return 8 if code == FLOAT64 else 4


@jit
def is_place(code: int, stride_v: int, width: int, valid: int) -> bool:
    """Whether a stored tile can be worked on where it lies; ``valid`` of its ``width`` columns exist."""
    return code == FLOAT32 and stride_v == 1 and width == valid


@jit
def load_tile(
    tile: int, width: int, address: int, code: int, stride_k: int, stride_v: int, rows: int, valid: int
) -> None:
    """A stored tile into scratch ``[rows, width]``; columns beyond ``valid`` become zero, all of it at address 0."""
    if address == 0:
        fill_row(tile, 0, rows * width, 0.0)
        return
    size = item_size(code)
    if stride_k == 1 and stride_v != 1:
        whole_k, whole_v = rows & -LANES, valid & -LANES
        for k in range(0, whole_k, LANES):
            for v in range(0, whole_v, LANES):
                transpose_in(tile + 4 * (k * width + v), width, address + size * (k + v * stride_v), stride_v, code)
    else:
        whole_k, whole_v = 0, 0
    for k in range(rows):
        done = whole_v if k < whole_k else 0
        if done < valid:
            at = address + size * (k * stride_k + done * stride_v)
            decode_row(tile + 4 * (k * width + done), at, stride_v, valid - done, code)
        if valid < width:
            fill_row(tile + 4 * k * width, valid, width, 0.0)


@jit
def store_tile(
    address: int, code: int, stride_k: int, stride_v: int, tile: int, stride: int, rows: int, valid: int
) -> None:
    """A place (rows ``stride`` apart) to where a state is stored, rounded to its dtype."""
    size = item_size(code)
    if stride_k == 1 and stride_v != 1:
        whole_k, whole_v = rows & -LANES, valid & -LANES
        for v in range(0, whole_v, LANES):
            for k in range(0, whole_k, LANES):
                transpose_out(address + size * (k + v * stride_v), stride_v, tile + 4 * (k * stride + v), stride, code)
    else:
        whole_k, whole_v = 0, 0
    for k in range(rows):
        done = whole_v if k < whole_k else 0
        if done < valid:
            at = address + size * (k * stride_k + done * stride_v)
            encode_row(at, stride_v, tile + 4 * (k * stride + done), valid - done, code)
