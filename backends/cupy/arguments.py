"""The kernel's one argument: a Call packed as ``struct Arguments`` of ``kernels/arguments.cuh``."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import torch

from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call

__all__ = ["ARGUMENT_BYTES", "filled", "pack", "template"]

#: Tensors in the order of the struct's addresses, with which it begins.
_ADDRESSES = (
    "q k v a b out A_log dt_bias pool intermediates cu_seqlens read_slots write_slots intermediate_rows parents".split()
)
_WORD = 8
# The addresses, 6 x Tokens (4 words), 2 x Vector (2), 2 x States (5), 3 words, 6 floats.
_LAYOUT = struct.Struct(f"={_WORD * len(_ADDRESSES)}x{6 * 4 + 2 * 2 + 2 * 5 + 3}q6f")
ARGUMENT_BYTES = _LAYOUT.size
#: One element: CuPy passes arrays of size one by value, and no others.
_ONE = np.dtype((np.void, ARGUMENT_BYTES))


def template(call: Call) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """The argument of calls like this one with every address 0, and where the addresses go.

    Returns:
        The bytes, and of each tensor present its index in ``TENSORS`` and the byte of its address.
    """
    kv = call.state_layout == "kv"
    out, parents = call.out, call.parents
    block = _LAYOUT.pack(
        *call.q.stride(),
        *call.k.stride(),
        *call.v.stride(),
        *call.a.stride(),
        *(() if call.is_kda else (0,)),
        *call.b.stride(),
        0,
        *(_contiguous(call.v.shape) if out is None else out.stride()),
        call.A_log.stride(0),
        0,
        *call.dt_bias.stride(),
        *(() if call.is_kda else (0,)),
        *_states(call.pool, kv),
        *_states(call.intermediates, kv),
        0 if parents is None else parents.stride(0),
        call.n,
        call.q.shape[1],
        call.scale,
        call.softplus_beta,
        call.softplus_threshold,
        0.0 if call.lower_bound is None else call.lower_bound,
        2.0 if call.allow_neg_eigval else 1.0,
        1.0 / call.softplus_beta,
    )
    given = ((name, _WORD * word) for word, name in enumerate(_ADDRESSES))
    places = ((TENSORS.index(name), at) for name, at in given if name == "out" or getattr(call, name) is not None)
    return block, tuple(places)


def pack(call: Call, out: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The argument, as an array of one element that is passed by value. Reads no device memory."""
    call = call if call.out is out else call.replace(out=out)
    return np.frombuffer(filled(call, *template(call)), _ONE)


def filled(call: Call, block: bytes, places: Iterable[tuple[int, int]]) -> bytearray:
    """A template with the addresses of the call's tensors in their places."""
    argument = bytearray(block)
    for index, at in places:
        struct.pack_into("=q", argument, at, getattr(call, TENSORS[index]).data_ptr())
    return argument


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _states(states: torch.Tensor | None, kv: bool) -> tuple[int, ...]:
    """Strides in the order slot, step, head, key, value; zeros of no states."""
    if states is None:
        return (0,) * 5
    *outer, x, y = states.stride()
    slot, step, head = outer if len(outer) == 3 else (outer[0], 0, outer[1])
    return (slot, step, head, *((x, y) if kv else (y, x)))
