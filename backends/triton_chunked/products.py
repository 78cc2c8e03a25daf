"""Matrix products of float32 accuracy on tensor cores that take bfloat16: operands in pieces that add up to them.

``x = bf16(x) + bf16(x - bf16(x)) + ...`` is exact after three pieces for float32 (Sterbenz), after two for float16, and
products of bfloat16 are exact in a tensor core. Of the products of pieces those are summed, smallest first, whose
places add up to less than PIECES; of three what is left out is below 2**-24 of the product. With one, operands are
rounded.
"""

# The body of a Triton function is Triton's language: types are inferred, tuples grow by +, and a test of a constant
# stands alone and has its else, so that what it excludes is never compiled.
# ruff: noqa: ANN001, ANN201, RET505, RUF005, SIM102
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_product", "negative", "pieces_of", "product", "transposed"]

#: bfloat16's largest finite value: beyond it the first piece would be infinite, and the second NaN.
LARGEST = tl.constexpr(3.3895313892515355e38)


@triton.jit
def pieces_of(x, PIECES: tl.constexpr):
    """``x`` in float32, or in the dtype of q, k and v, as bfloat16 tensors that add up to it (to PIECES of them)."""
    if x.dtype == tl.bfloat16:
        return (x,)
    else:
        rest = x.to(tl.float32)
        pieces = ()
        for i in tl.static_range(PIECES):
            piece = tl.clamp(rest, -LARGEST, LARGEST).to(tl.bfloat16)
            pieces = pieces + (piece,)
            if i + 1 < PIECES:
                rest = rest - piece.to(tl.float32)
        return pieces


@triton.jit
def negative(pieces):
    """Minus each: a sum minus a product of it is formed apart from the sum, which a tensor core would cut off."""
    negated = ()
    for i in tl.static_range(len(pieces)):
        negated = negated + (-pieces[i],)
    return negated


@triton.jit
def transposed(pieces):
    turned = ()
    for i in tl.static_range(len(pieces)):
        turned = turned + (tl.trans(pieces[i]),)
    return turned


@triton.jit
def add_product(total, x, y, PIECES: tl.constexpr):
    """``total + x y`` of pieces ``[M, K]`` and ``[K, N]``; a tensor core cuts the sum off, total included.

    Products are left out whose pieces are PIECES or more below the largest ones.
    """
    for down in tl.static_range(PIECES):
        for i in tl.static_range(len(x)):
            if PIECES - 1 - down - i >= 0:
                if PIECES - 1 - down - i < len(y):
                    total = tl.dot(x[i], y[PIECES - 1 - down - i], total)
    return total


@triton.jit
def product(x, y, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr):
    """``[M, N]`` of pieces ``[M, K]`` and ``[K, N]``."""
    return add_product(tl.zeros([M, N], tl.float32), x, y, PIECES)
