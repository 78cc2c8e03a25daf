"""Where a block finds its sequence: the tokens, the states, and the kernel's strides by name."""

from __future__ import annotations

from typing import Any

from .parameters import STRIDES
from .target import Function, Target
from .variant import Variant

__all__ = ["grid", "locate_of"]

# Places in the kernels' argument ``strides``.
(
    Q_BATCH,
    Q_TOKEN,
    Q_HEAD,
    Q_INNER,
    K_BATCH,
    K_TOKEN,
    K_HEAD,
    K_INNER,
    V_BATCH,
    V_TOKEN,
    V_HEAD,
    V_INNER,
    A_BATCH,
    A_TOKEN,
    A_HEAD,
    A_INNER,
    B_BATCH,
    B_TOKEN,
    B_HEAD,
    OUT_BATCH,
    OUT_TOKEN,
    OUT_HEAD,
    OUT_INNER,
    A_LOG_HEAD,
    DT_BIAS_HEAD,
    DT_BIAS_INNER,
    POOL_SLOT,
    POOL_HEAD,
    POOL_K,
    POOL_V,
    STEPS_ROW,
    STEPS_STEP,
    STEPS_HEAD,
    STEPS_K,
    STEPS_V,
) = range(len(STRIDES))

#: ``thread & THREAD`` and ``block & BLOCK`` change nothing, but tell the compiler that neither is negative: without
#: that every division and remainder is Python's, of 64-bit numbers of either sign, and every product has 64 bits.
THREAD, BLOCK = 1023, 0x7FFFFFFF

#: Blocks along the grid's y axis at most.
_MOST_Y = 65535


def grid(variant: Variant, n: int, hv: int) -> tuple[int, int, int]:
    """Blocks for ``n`` sequences of ``hv`` value heads: (tile, head) along x, sequences along y, and what is left on z.

    A block's sequence is ``blockIdx.z * gridDim.y + blockIdx.y``; the last ones on z may have none. So no number of
    heads or sequences is divided by, and none is compiled in.
    """
    return variant.tiles * hv, min(n, _MOST_Y), -(-n // _MOST_Y)


def locate_of(variant: Variant, target: Target) -> Function:
    """``(n, row_length, read_slots, write_slots, cu_seqlens, rows, wide_read, wide_write, wide_cu, wide_rows,
    found)``.

    Fills ``found`` with batch, start, length, read slot, write slot and row of the buffer of sequence ``n``; -1 where
    there is no slot or row. No load waits for another: one memory latency, whatever comes next.
    """
    varlen, reads, verify = variant.varlen, variant.state is not None, variant.verify != "none"
    in_place, separate = variant.update == "in_place", variant.update == "separate"
    load_index = target.load_index

    @target.device
    def locate(
        n: Any,
        row_length: Any,
        read_slots: Any,
        write_slots: Any,
        cu_seqlens: Any,
        rows: Any,
        wide_read: Any,
        wide_write: Any,
        wide_cu: Any,
        wide_rows: Any,
        found: Any,
    ) -> Any:
        batch = n
        start = 0
        length = row_length
        read_slot = -1
        write_slot = -1
        step_row = -1
        if varlen:
            width = 8 if wide_cu else 4
            batch = 0
            start = load_index(cu_seqlens + n * width, wide_cu)
            length = load_index(cu_seqlens + (n + 1) * width, wide_cu) - start
        if reads:
            read_slot = load_index(read_slots + n * (8 if wide_read else 4), wide_read)
        if in_place:
            write_slot = read_slot
        if separate:
            write_slot = load_index(write_slots + n * (8 if wide_write else 4), wide_write)
        if verify:
            step_row = load_index(rows + n * (8 if wide_rows else 4), wide_rows)
        found[0] = batch
        found[1] = start
        found[2] = length
        found[3] = read_slot
        found[4] = write_slot
        found[5] = step_row

    return locate
