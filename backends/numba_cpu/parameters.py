"""The parameter block: one call's addresses, strides and sizes, as two flat arrays.

Compiled code has this one signature for every mix of dtypes, layouts and features, so there is one kernel to compile
and a call crosses into it with two arrays instead of twenty tensors. Names are positions in the blocks.
"""

from __future__ import annotations

from typing import Final, Protocol

__all__ = ["INTEGERS", "REALS", "TENSOR", "Integers", "Reals"]


class Integers(Protocol):
    """The integer block as compiled code sees it: an array in the entry points, a bare pointer in the worker."""

    def __getitem__(self, place: int, /) -> int: ...


class Reals(Protocol):
    """The block of float64 scalars."""

    def __getitem__(self, place: int, /) -> float: ...


# A tensor takes TENSOR places: address (0: absent), dtype code, then the strides of up to five axes, in elements.
# States have the axes [slot, head, k, v] or [row, step, head, k, v] here, whatever their layout.
TENSOR: Final = 7
CODE: Final = 1
STRIDES: Final = 2

Q: Final = 0 * TENSOR
KEY: Final = 1 * TENSOR
VALUE: Final = 2 * TENSOR
A: Final = 3 * TENSOR
B: Final = 4 * TENSOR
A_LOG: Final = 5 * TENSOR
DT_BIAS: Final = 6 * TENSOR
POOL: Final = 7 * TENSOR
STEPS: Final = 8 * TENSOR
OUT: Final = 9 * TENSOR

# Index tensors: address (0: absent) and bytes per element; parents also has two strides.
CU_SEQLENS: Final = 10 * TENSOR
READ: Final = CU_SEQLENS + 2
WRITE: Final = READ + 2
ROWS: Final = WRITE + 2
PARENTS: Final = ROWS + 2

N: Final = PARENTS + 4  # sequences
LENGTH: Final = N + 1  # tokens of each, without cu_seqlens
GROUP: Final = N + 2  # value heads per query head
HEADS: Final = N + 3  # value heads
KEY_DIM: Final = N + 4
VALUE_DIM: Final = N + 5
IS_KDA: Final = N + 6
BOUNDED: Final = N + 7  # the gate has a lower bound
L2NORM: Final = N + 8
V_TILE: Final = N + 9  # widest tile
V_SPAN: Final = N + 10  # columns of V per task
CHUNK: Final = N + 11  # tokens staged at a time
WORKERS: Final = N + 12

# Per worker scratch, in bytes: its size, then what lies where. Keys, decays and queries come first, four rows a token.
SCRATCH: Final = N + 13
ROW: Final = N + 14  # bytes of a staged row of K
VALUE_ROW: Final = N + 15  # bytes of a staged row of V_SPAN
VALUES: Final = N + 16
BETAS: Final = N + 17
GATES: Final = N + 18
BIAS: Final = N + 19
DELTA: Final = N + 20
TILE: Final = N + 21
STARTED: Final = N + 22  # sequences with tokens; filled in by the entry points
INTEGERS: Final = N + 23

SOFTPLUS_BETA: Final = 0
SOFTPLUS_THRESHOLD: Final = 1
SCALE: Final = 2
LOWER_BOUND: Final = 3
BETA_FACTOR: Final = 4  # 2 where negative eigenvalues are allowed
REALS: Final = 5
