"""The kernel's one argument: a Call packed as ``struct Arguments`` of ``kernels/arguments.cuh``."""

from __future__ import annotations

import struct

import numpy as np
import torch

from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call

__all__ = ["ARGUMENT_BYTES", "pack", "template"]

# 6 x Tokens (5 words), 2 x Vector (4), 2 x States (6), 5 x Indices (2), 8 words, 6 floats.
_LAYOUT = struct.Struct(f"={6 * 5 + 2 * 4 + 2 * 6 + 5 * 2 + 8}q6f")
ARGUMENT_BYTES = _LAYOUT.size
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
#: One element: CuPy passes arrays of size one by value, and no others.
_ONE = np.dtype((np.void, ARGUMENT_BYTES))
_NO_STATES = (0, 0, 0, 0, 0, 0)
_NO_INDICES = (0, 0)
_WORD = 8
#: Tensors in the order of the struct, and the word that each one's address is.
_WORDS = dict(
    zip(
        "q k v a b out A_log dt_bias pool intermediates "
        "cu_seqlens read_slots write_slots intermediate_rows parents".split(),
        (0, 5, 10, 15, 20, 25, 30, 34, 38, 44, 50, 52, 54, 56, 58),
        strict=True,
    )
)


def template(call: Call) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """The argument of calls like this one with every address 0, and where the addresses go.

    Returns:
        The bytes, and of each tensor present its index in ``TENSORS`` and the byte of its address.
    """
    kv = call.state_layout == "kv"
    out, parents = call.out, call.parents
    block = _LAYOUT.pack(
        *(0, *call.q.stride()),
        *(0, *call.k.stride()),
        *(0, *call.v.stride()),
        *(0, *call.a.stride(), *(() if call.is_kda else (0,))),
        *(0, *call.b.stride(), 0),
        *(0, *(_contiguous(call.v.shape) if out is None else out.stride())),
        *(0, call.A_log.stride(0), 0, _FORMATS[call.A_log.dtype]),
        *(0, *call.dt_bias.stride(), *(() if call.is_kda else (0,)), _FORMATS[call.dt_bias.dtype]),
        *_states(call.pool, kv),
        *_states(call.intermediates, kv),
        *_indices(call.cu_seqlens),
        *_indices(call.read_slots),
        *_indices(call.write_slots),
        *_indices(call.intermediate_rows),
        *_indices(parents),
        0 if parents is None else parents.stride(0),
        call.n,
        call.q.shape[1],
        call.hv // call.h,
        _FORMATS[call.a.dtype],
        _FORMATS[call.b.dtype],
        call.use_qk_l2norm,
        call.lower_bound is not None,
        call.scale,
        call.softplus_beta,
        call.softplus_threshold,
        0.0 if call.lower_bound is None else call.lower_bound,
        2.0 if call.allow_neg_eigval else 1.0,
        1.0 / call.softplus_beta,
    )
    given = {name for name in TENSORS if name == "out" or getattr(call, name) is not None}
    return block, tuple((TENSORS.index(name), _WORD * word) for name, word in _WORDS.items() if name in given)


def pack(call: Call, out: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The argument, as an array of one element that is passed by value. Reads no device memory."""
    call = call if call.out is out else call.replace(out=out)
    block, places = template(call)
    filled = bytearray(block)
    for index, at in places:
        struct.pack_into("=q", filled, at, getattr(call, TENSORS[index]).data_ptr())
    return np.frombuffer(filled, _ONE)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _states(states: torch.Tensor | None, kv: bool) -> tuple[int, ...]:
    """Address and strides in the order slot, step, head, key, value."""
    if states is None:
        return _NO_STATES
    *outer, x, y = states.stride()
    slot, step, head = outer if len(outer) == 3 else (outer[0], 0, outer[1])
    return (0, slot, step, head, *((x, y) if kv else (y, x)))


def _indices(indices: torch.Tensor | None) -> tuple[int, int]:
    return _NO_INDICES if indices is None else (0, indices.element_size())
