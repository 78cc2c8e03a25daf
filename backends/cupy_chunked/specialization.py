"""From a problem and a config to what the kernels are compiled for: the macros of ``kernels/chunks.cuh``."""

from __future__ import annotations

from dataclasses import dataclass

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .arguments import CHUNK, passing_bytes, record_bytes

__all__ = ["Specialization"]

_TYPES = {None: "float", "float32": "float", "bfloat16": "bfloat16", "float16": "float16", "float64": "double"}
_INDICES = {None: "int", "int32": "int", "int64": "int64"}
#: bfloat16 that a value is the sum of.
_IO_PIECES = {"bfloat16": 1, "float16": 2, "float": 3}
#: Macros that ``prepare.cu`` has no use for.
_NOT_PREPARED: dict[str, int | str] = {
    "VALUE_DIM": 16,
    "CONFIG_WARPS": 1,
    "CONFIG_STAGES": 1,
    "GROUP_PRODUCTS": 0,
    "SEGMENT_CHUNKS": 0,
    "LOCAL_PASS": 0,
    "STATE_TYPE": "float",
    "SLOT_INDEX": "int",
    "STATE_VK": 0,
    "READS_STATE": 0,
    "WRITES_STATE": 0,
    "WIDE_STATES": 0,
}
#: Macros that ``join.cu`` has no use for.
_NOT_JOINED: dict[str, int | str] = {"CONFIG_WARPS": 1, "CONFIG_STAGES": 1, "GROUP_PRODUCTS": 0}
#: Threads of ``prepare``; columns of V of a block of ``join``, and threads per key there.
_PREPARE_THREADS, _JOIN_COLUMNS, _JOIN_PARTS = 128, 8, 4
#: Beside the tiles of the first kernel: gates of two heads, norms and factors; and what the triangular solve needs.
_SMALL_BYTES = (2 * 9 + 2) * CHUNK * 4
_DIAGONAL_BYTES, _SOLVED_BYTES = 4 * 16 * 20 * 4, 2 * 6 * 512


@dataclass(frozen=True, slots=True)
class Specialization:
    """Everything that is fixed when the kernels are compiled. Sizes of the batch, strides and scalars are not.

    Attributes:
        k, v: head dimensions; sharing: value heads per query/key head.
        heads, warps, stages, group, cut, local: the config (see ``configs.py``); pieces: bfloat16 that stand for one
            float32 in products.
        io, state: C++ types of q, k, v and out, and of the pool.
        a, b, A_log, bias, slot, cu: of the gate inputs and of the indices.
        vk: state layout; norm: q and k are normalised; varlen: packed by offsets.
        read, write: which states are touched.
    """

    k: int
    v: int
    sharing: int
    heads: int
    warps: int
    stages: int
    group: bool
    cut: int
    local: int
    pieces: int
    io: str
    state: str
    a: str
    b: str
    A_log: str
    bias: str
    slot: str
    cu: str
    vk: bool
    norm: bool
    varlen: bool
    read: bool
    write: bool

    @classmethod
    def of(cls, problem: Problem, config: Config, pieces: int) -> Specialization:
        """The kernels that ``config`` means for ``problem``. Raises ValueError for chunks of another length."""
        if config["chunk"] != CHUNK:
            raise ValueError(f"chunk: {CHUNK}, not {config['chunk']}")
        more = config.to_dict()
        cut = int(more.get("cut", 0))
        if cut % CHUNK:
            raise ValueError(f"cut: a multiple of {CHUNK} tokens, not {cut}")
        return cls(
            k=problem.k,
            v=problem.v,
            sharing=problem.hv // problem.h,
            heads=int(config["heads"]),
            warps=int(config["warps"]),
            stages=int(config["stages"]),
            group=bool(config["group"]),
            cut=cut,
            local=int(more.get("local", 0)),
            pieces=pieces,
            io=_TYPES[problem.io_dtype],
            state=_TYPES[problem.state_dtype],
            a=_TYPES[problem.a_dtype],
            b=_TYPES[problem.b_dtype],
            A_log=_TYPES[problem.A_log_dtype],
            bias=_TYPES[problem.dt_bias_dtype],
            slot=_INDICES[problem.index_dtype],
            cu=_INDICES[problem.cu_dtype],
            vk=problem.state_layout == "vk",
            norm=problem.l2norm,
            varlen=problem.varlen,
            read=problem.update != "none",
            write=problem.update in ("in_place", "separate"),
        )

    @property
    def keys(self) -> int:
        """K, padded to whole products of tensor cores."""
        return -(-self.k // 16) * 16

    @property
    def kernels(self) -> tuple[str, ...]:
        """In the order they run in. ``local`` and ``scan`` are one source."""
        return ("prepare", "local", "join", "scan") if self.cut else ("prepare", "scan")

    def tiles(self, kernel: str) -> int:
        """Blocks per value head and sequence, segment or chunk."""
        if kernel == "join":
            return -(-self.v // _JOIN_COLUMNS)
        columns = 16 * self._warps(kernel)
        return -(-self.v // columns) + (-(-self.k // columns) if kernel == "local" else 0)

    def _warps(self, kernel: str) -> int:
        return self.local if kernel == "local" else self.warps

    @property
    def prepare_bytes(self) -> int:
        """Shared memory of a block of the first kernel: two tiles, in whose place a triangle is then solved."""
        tiles = _IO_PIECES[self.io] * 2 * _tile_bytes(self.keys)
        solve = _DIAGONAL_BYTES + (2 if self.pieces == 1 else 3) * _SOLVED_BYTES
        return _SMALL_BYTES + max(tiles, solve)

    @property
    def scan_bytes(self) -> int:
        """Shared memory of a block of the second: so many chunks at a time."""
        tiles = 2 * _tile_bytes(self.keys) + _tile_bytes(16 * self.warps)
        return self.stages * (-(-record_bytes(self.pieces) // 1024) * 1024 + _IO_PIECES[self.io] * tiles)

    @property
    def local_bytes(self) -> int:
        """The same where no outputs are formed: no queries, and half of the record."""
        tiles = _tile_bytes(self.keys) + _tile_bytes(16 * self.local)
        return self.stages * (-(-passing_bytes(self.pieces) // 1024) * 1024 + _IO_PIECES[self.io] * tiles)

    def block(self, kernel: str) -> tuple[int, int]:
        """Threads of a kernel's blocks, and bytes of their dynamic shared memory."""
        if kernel == "prepare":
            return _PREPARE_THREADS, self.prepare_bytes
        if kernel == "join":
            return self.keys * _JOIN_PARTS, 0
        # With products of four warps, four more bring what they work on.
        threads = 32 * self._warps(kernel) + (128 if self.group else 0)
        return threads, self.local_bytes if kernel == "local" else self.scan_bytes

    def options(self, kernel: str, wide: bool) -> tuple[str, ...]:
        """Compiler options that name what a kernel has of this specialisation, in a fixed order.

        What the first kernel does not look at is the same for all: it is compiled once for every pool, and of a config
        only for ``heads``; the others are compiled once for all of these.
        """
        values: dict[str, int | str] = {
            "KEY_DIM": self.k,
            "VALUE_DIM": self.v,
            "HEAD_GROUP": self.sharing,
            "PREPARED_HEADS": self.heads if kernel == "prepare" else 1,
            "CONFIG_WARPS": self._warps(kernel),
            "CONFIG_STAGES": self.stages,
            "GROUP_PRODUCTS": int(self.group),
            "SEGMENT_CHUNKS": self.cut // CHUNK,
            "LOCAL_PASS": int(kernel == "local"),
            "OPERAND_PIECES": self.pieces,
            "IO_TYPE": self.io,
            "STATE_TYPE": self.state,
            "A_TYPE": self.a,
            "B_TYPE": self.b,
            "A_LOG_TYPE": self.A_log,
            "BIAS_TYPE": self.bias,
            "SLOT_INDEX": self.slot,
            "CU_INDEX": self.cu,
            "STATE_VK": int(self.vk),
            "L2_NORM": int(self.norm),
            "IS_VARLEN": int(self.varlen),
            "READS_STATE": int(self.read),
            "WRITES_STATE": int(self.write),
            "WIDE_ROWS": int(wide),
            "WIDE_STATES": int(wide and self.vk and self.read),
        }
        if kernel == "prepare":
            values |= _NOT_PREPARED
        elif kernel == "join":
            values |= _NOT_JOINED
        return tuple(f"-D{name}={value}" for name, value in values.items())


def _tile_bytes(columns: int) -> int:
    """``Tile<columns>``, one piece: panels of 64 columns."""
    return -(-columns // 64) * CHUNK * 128
