"""The calls that stand for all others: what configs, properties and sanitizers are tried on. Torch-free."""

from __future__ import annotations

from ...registry.ops.fused_sigmoid_gating.case import CaseSpec

__all__ = ["CONFIG_CASES", "DECODE", "ODD_SIZES", "REPRESENTATIVE", "SANITIZED"]

_BASE = CaseSpec("gdn kv", (9, 0, 20, 1, 5), k=128, v=128, padded=(4,))
_VK = _BASE.but(name="gdn vk", state_layout="vk")
_KDA = _BASE.but(name="kda vk", is_kda=True, state_layout="vk")
_TREE = _BASE.but(
    name="tree, bfloat16 buffer", lengths=(3, 0, 7, 1), padded=(3,), verify="tree", intermediate_dtype="bfloat16"
)
#: What works in chunks (of 64 tokens) has more of them here than stages in flight, and what cuts has several segments.
_CHUNKS = _BASE.but(name="several chunks", lengths=(330, 70, 1), padded=(2,), h=1, hv=2, k=64, v=64)
DECODE = _BASE.but(name="decode vk", lengths=(1,) * 6, padded=(2,), state_layout="vk")

#: Every config computes these; in both layouts where that is likeliest to differ.
CONFIG_CASES: tuple[CaseSpec, ...] = (
    _BASE,
    _VK,
    _CHUNKS,
    _CHUNKS.but(name="several chunks vk, bfloat16 pool", state_layout="vk", state_dtype="bfloat16"),
    _BASE.but(name="gdn vk, bfloat16 pool", state_layout="vk", state_dtype="bfloat16"),
    _KDA,
    _BASE.but(name="kda kv, K=96 V=192, rows", is_kda=True, k=96, v=192, strides="rows", extra_rows=2),
    _TREE,
    _BASE.but(name="chain vk, float16", lengths=(3, 2), padded=(), verify="chain", io_dtype="float16").but(
        state_layout="vk"
    ),
    _BASE.but(name="strided, K=100 V=5", strides="any", k=100, v=5),
    _BASE.but(name="K=V=256 vk", k=256, v=256, hv=2, state_layout="vk"),
    DECODE,
    DECODE.but(name="decode kv, bfloat16 pool", state_layout="kv", state_dtype="bfloat16"),
    DECODE.but(name="decode kda kv, float32", state_layout="kv", is_kda=True, io_dtype="float32"),
)

#: One of each kind: what graphs, threads and load are tried on.
REPRESENTATIVE: tuple[CaseSpec, ...] = (_VK, _KDA.but(name="kda kv", state_layout="kv"), _TREE, _CHUNKS, DECODE)

#: (K, V): one, three, a shipped model's 96 and 192, no multiple of anything, the largest.
ODD_SIZES: tuple[tuple[int, int], ...] = ((1, 1), (3, 3), (96, 192), (100, 5), (1, 256), (256, 256))

_SMALL = CaseSpec("gdn vk, padding", (5, 0, 3, 1), k=128, v=128, padded=(3,), state_layout="vk")
#: Short calls for tools that slow a kernel a hundredfold.
SANITIZED: tuple[CaseSpec, ...] = (
    _SMALL,
    _SMALL.but(name="several chunks", lengths=(330, 70, 1), padded=(2,), h=1, hv=2, k=64, v=64),
    _SMALL.but(name="gdn kv, bfloat16 pool", state_layout="kv", state_dtype="bfloat16"),
    _SMALL.but(name="decode vk, bfloat16 pool", lengths=(1, 1, 1), padded=(1,), state_dtype="bfloat16"),
    _SMALL.but(name="decode kv", lengths=(1, 1, 1), padded=(1,), state_layout="kv"),
    _SMALL.but(name="tree, bfloat16 buffer", verify="tree", intermediate_dtype="bfloat16", state_layout="kv"),
    _SMALL.but(name="chain, float16", verify="chain", io_dtype="float16"),
    _SMALL.but(name="kda, K=96 V=192, rows", is_kda=True, k=96, v=192, strides="rows", extra_rows=2),
    _SMALL.but(name="kda kv, strided, K=100 V=5", is_kda=True, k=100, v=5, strides="any", state_layout="kv"),
    _SMALL.but(name="K=1 V=3, int64", k=1, v=3, index_dtype="int64", cu_dtype="int64"),
    _SMALL.but(name="K=3 V=1 kv", k=3, v=1, state_layout="kv"),
    _SMALL.but(
        name="K=V=256, other slots", lengths=(3, 2), padded=(), fresh=(0,), update="separate", k=256, v=256, hv=2
    ),
    _SMALL.but(name="equal lengths, read only", lengths=(4, 4), padded=(), varlen=False, update="disabled"),
)
