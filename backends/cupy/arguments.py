"""The kernel's one argument: a Call packed as ``struct Arguments`` of ``kernels/arguments.cuh``."""

from __future__ import annotations

import struct

import numpy as np
import torch

from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["ARGUMENT_BYTES", "pack"]

# 6 x Tokens (5 words), 2 x Vector (4), 2 x States (6), 5 x Indices (2), 8 words, 6 floats.
_LAYOUT = struct.Struct(f"={6 * 5 + 2 * 4 + 2 * 6 + 5 * 2 + 8}q6f")
ARGUMENT_BYTES = _LAYOUT.size
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
#: One element: CuPy passes arrays of size one by value, and no others.
_ONE = np.dtype((np.void, ARGUMENT_BYTES))
_NO_STATES = (0, 0, 0, 0, 0, 0)
_NO_INDICES = (0, 0)


def pack(call: Call, out: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The argument, as an array of one element that CuPy and the CPU engine pass by value. Reads no device memory."""
    kv = call.state_layout == "kv"
    parents = call.parents
    data = _LAYOUT.pack(
        call.q.data_ptr(),
        *call.q.stride(),
        call.k.data_ptr(),
        *call.k.stride(),
        call.v.data_ptr(),
        *call.v.stride(),
        call.a.data_ptr(),
        *call.a.stride(),
        *(() if call.is_kda else (0,)),
        call.b.data_ptr(),
        *call.b.stride(),
        0,
        out.data_ptr(),
        *out.stride(),
        call.A_log.data_ptr(),
        call.A_log.stride(0),
        0,
        _FORMATS[call.A_log.dtype],
        call.dt_bias.data_ptr(),
        *call.dt_bias.stride(),
        *(() if call.is_kda else (0,)),
        _FORMATS[call.dt_bias.dtype],
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
    return np.frombuffer(data, _ONE)


def _states(states: torch.Tensor | None, kv: bool) -> tuple[int, ...]:
    """Address and strides in the order slot, step, head, key, value."""
    if states is None:
        return _NO_STATES
    *outer, x, y = states.stride()
    slot, step, head = outer if len(outer) == 3 else (outer[0], 0, outer[1])
    return (states.data_ptr(), slot, step, head, *((x, y) if kv else (y, x)))


def _indices(indices: torch.Tensor | None) -> tuple[int, int]:
    return _NO_INDICES if indices is None else (indices.data_ptr(), indices.element_size())
