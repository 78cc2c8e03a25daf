"""The kernels' one argument: a Call packed as ``struct Arguments`` of ``kernels/chunks.cuh``."""

from __future__ import annotations

import struct

from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call

__all__ = [
    "CHUNK",
    "RECORDS_AT",
    "VECTORS",
    "aligned",
    "crossing_bytes",
    "passing_bytes",
    "record_bytes",
    "slots",
    "template",
    "workspace",
]

#: Tokens of a chunk.
CHUNK = 64
#: Tensors in the order of the struct's addresses, with which it begins; behind them the address of the records.
_ADDRESSES = "q k v a b out A_log dt_bias pool cu_seqlens read_slots write_slots".split()
_WORD = 8
#: The byte where the records' address goes.
RECORDS_AT = _WORD * len(_ADDRESSES)
# The addresses, 6 x Tokens (4 words), 2 strides, States (4), 4 words, 6 floats.
_LAYOUT = struct.Struct(f"={RECORDS_AT + _WORD}x{6 * 4 + 2 + 4 + 4}q6f")
#: Tensors whose addresses must be multiples of 16 bytes, if they are accessed so.
VECTORS = ("q", "k", "v", "out", "pool")
_VECTOR = 16


def template(call: Call) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """The argument of calls like this one with every address 0, and where the addresses go.

    Returns:
        The bytes, and of each tensor present its index in ``TENSORS`` and the byte of its address.
    """
    pool = (0, 0, 0, 0)
    if call.pool is not None:
        slot, head, x, y = call.pool.stride()
        pool = (slot, head, x, y) if call.state_layout == "kv" else (slot, head, y, x)
    block = _LAYOUT.pack(
        *call.q.stride(),
        *call.k.stride(),
        *call.v.stride(),
        *(*call.a.stride(), 0),
        *(*call.b.stride(), 0),
        *_out_stride(call),
        call.A_log.stride(0),
        call.dt_bias.stride(0),
        *pool,
        call.n,
        call.q.shape[1],
        call.hv,
        slots(call),
        call.scale,
        call.softplus_beta,
        call.softplus_threshold,
        0.0,
        2.0 if call.allow_neg_eigval else 1.0,
        1.0 / call.softplus_beta,
    )
    given = ((name, _WORD * word) for word, name in enumerate(_ADDRESSES))
    places = ((TENSORS.index(name), at) for name, at in given if name == "out" or getattr(call, name) is not None)
    return block, tuple(places)


def slots(call: Call, span: int = CHUNK) -> int:
    """Parts of ``span`` tokens there is room for: no fewer than there are, known without the lengths.

    Chunks by default; segments are numbered alike (``Sequence`` in chunks.cuh).
    """
    length = call.q.shape[1]
    return length // span + call.n if call.cu_seqlens is not None else call.n * -(-length // span)


def record_bytes(pieces: int) -> int:
    """``sizeof(Record)``: what one kernel leaves to the other of a chunk and value head."""
    return pieces * 2 * 12 * 512 + 3 * 4 * CHUNK + 16


def passing_bytes(pieces: int) -> int:
    """``sizeof(Passing)``: the part of it that moves a state on."""
    return pieces * 12 * 512 + 2 * 4 * CHUNK + 16


def crossing_bytes(k: int, v: int) -> int:
    """``sizeof(Crossing)``: what a segment does to a value head's state, and the state that it starts from."""
    return (k + v) * (-(-k // 16) * 16) * 4


def workspace(call: Call, pieces: int, span: int = 0) -> int:
    """Bytes that the kernels leave each other of a call: records of chunks, and of segments of ``span`` tokens."""
    count = 0
    if span:
        count = 2 * call.q.shape[1] // span + 1 if call.cu_seqlens is not None else slots(call, span)
    crossings = count * crossing_bytes(call.key_dim, call.value_dim)
    return call.hv * (slots(call) * record_bytes(pieces) + crossings)


def aligned(call: Call) -> bool:
    """Whether sizes and strides allow rows to be accessed 16 bytes at a time (states in pairs)."""
    if call.key_dim % (_VECTOR // 2) or call.value_dim % (_VECTOR // 2):
        return False
    for stride in (call.q.stride(), call.k.stride(), call.v.stride(), _out_stride(call)):
        if stride[-1] != 1 or any(s * call.q.element_size() % _VECTOR for s in stride[:-1]):
            return False
    if call.pool is None or call.state_layout == "kv":
        return True
    *outer, last = call.pool.stride()
    return last == 1 and not any(s * call.pool.element_size() % _VECTOR for s in outer)


def _out_stride(call: Call) -> tuple[int, ...]:
    if call.out is not None:
        return call.out.stride()
    import torch

    return torch.empty(call.v.shape, device="meta").stride()
