"""Who computes what: workers draw tasks, those of long sequences first, from one counter.

A task is one sequence, one value head and one span of V, and touches no state that another task touches. Tasks are
drawn and not dealt out, so ragged batches balance; which worker computes a task changes no bit of it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from . import parameters as at
from .emit import I64, inlined, jit, operation
from .parameters import Integers, Reals
from .rows import take_ticket
from .sequence import bounds, run_task

__all__ = ["call_worker", "longest_first", "work"]

_BITS = 64


@jit
def longest_first(p: Integers) -> NDArray[np.int64]:
    """Sequence numbers in the order to be started: by length, longest first, to within a factor of two.

    Empty sequences are left out: they have nothing to compute and nothing to store.
    """
    counts = np.zeros(_BITS + 1, np.int64)
    for n in range(p[at.N]):
        counts[_bits(bounds(p, n)[2])] += 1
    starts = np.zeros(_BITS + 1, np.int64)
    for bits in range(_BITS - 1, 0, -1):
        starts[bits] = starts[bits + 1] + counts[bits + 1]
    order = np.empty(p[at.N] - counts[0], np.int64)
    for n in range(p[at.N]):
        bits = _bits(bounds(p, n)[2])
        if bits > 0:
            order[starts[bits]] = n
            starts[bits] += 1
    return order


@jit
def _bits(length: int) -> int:
    bits = 0
    while length > 0:
        length >>= 1
        bits += 1
    return bits


@inlined
def work(p: Integers, r: Reals, order: Integers, counter: int) -> None:
    """One worker: draw tasks until none is left. ``counter`` is the address of an int64, shared by all."""
    spans = (p[at.VALUE_DIM] + p[at.V_SPAN] - 1) // p[at.V_SPAN]
    per_sequence = p[at.HEADS] * spans
    memory = np.empty(p[at.SCRATCH] + 64, np.uint8)
    scratch = (memory.ctypes.data + 63) & -64
    ticket = take_ticket(counter)
    while ticket < p[at.STARTED] * per_sequence:
        n = order[ticket // per_sequence]
        rest = ticket % per_sequence
        run_task(p, r, n, rest // spans, (rest % spans) * p[at.V_SPAN], scratch)
        ticket = take_ticket(counter)
    # Keeps the memory alive for as long as its address is in use.
    memory[0] = 0


@operation("void", "i64", "i64", "i64", "i64", "i64")
def call_worker(
    b: ir.IRBuilder, worker: ir.Value, p: ir.Value, r: ir.Value, order: ir.Value, counter: ir.Value
) -> None:
    """``call_worker(worker, p, r, order, counter)``: call the compiled :func:`work` at an address.

    Called and not linked: the entry points stay small, and each compiles in a moment.
    """
    kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
    b.call(b.inttoptr(worker, kind.as_pointer()), [p, r, order, counter])
