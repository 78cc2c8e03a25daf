"""Variant: everything a compiled kernel is specialised on, and the block geometry that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Intermediates, Problem, StateLayout, Strides, Update

__all__ = ["CHUNK", "ITEM", "WARP", "Variant"]

WARP = 32
#: Consecutive K values that one lane takes at a time: 16 bytes of a float32 state, 8 of a 16-bit one. Part of the order
#: in which sums over K are formed, so it is no config: no config changes a bit of the result.
CHUNK = 4
#: Lanes that can share K by halving, and columns that a vector can hold.
_POWERS = (1, 2, 4, 8, 16, 32)
#: Bytes per element.
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Variant:
    """Compile-time constants of one kernel.

    A block owns ``tile`` columns of V of one (sequence, value head). A warp's 32 lanes form ``groups`` groups of
    ``lanes``; a group owns ``columns`` adjacent columns, its lanes share out K in chunks of :data:`CHUNK`.

    Attributes:
        sharing: value heads per query/key head: all that a kernel knows of the numbers of heads.
        k, v, io, a, b, A_log, dt_bias, state, steps: as in ``Problem`` (dtypes by name; state and steps None where
            there is none).
        strides: ``dense``: token strides are constants; ``rows``: given per call; ``any``: every stride is.
        wide: states are read and written in vectors; needs the alignment ``Alignment`` in ``parameters`` checks.
        lanes, columns, warps: see above.
        window: tokens staged in shared memory at a time, a multiple of the warps that stage; 0: nothing is staged.
        stagers: further warps that do nothing but stage; with 0 the others do it between two windows.
        overlap: a token's output is reduced while the next token's prediction is.
        streaming: the pool's states are loaded and stored as lines that nobody will want soon.
        resident: blocks that must fit one multiprocessor at a time: bounds the registers of a thread.
    """

    sharing: int
    k: int
    v: int
    io: str
    a: str
    b: str
    A_log: str
    dt_bias: str
    state: str | None
    layout: StateLayout
    steps: str | None
    kda: bool
    bounded: bool
    l2norm: bool
    neg_eigval: bool
    update: Update
    verify: Intermediates
    varlen: bool
    strides: Strides
    wide: bool
    lanes: int
    columns: int
    warps: int
    window: int
    stagers: int
    overlap: bool
    streaming: bool
    resident: int

    def __post_init__(self) -> None:
        """Raises ValueError for a block that shuffles or vectors cannot serve."""
        for name in ("lanes", "columns"):
            value = getattr(self, name)
            if value not in _POWERS:
                raise ValueError(f"{name}: one of {_POWERS}, not {value}")

    @classmethod
    def of(cls, problem: Problem, config: Config, wide: bool) -> Variant:
        """The kernel that ``config`` means for ``problem``; ``wide`` is ignored where strides are ``any``."""
        return cls(
            sharing=problem.hv // problem.h,
            k=problem.k,
            v=problem.v,
            io=problem.io_dtype,
            a=problem.a_dtype,
            b=problem.b_dtype,
            A_log=problem.A_log_dtype,
            dt_bias=problem.dt_bias_dtype,
            state=problem.state_dtype,
            layout=problem.state_layout,
            steps=problem.intermediate_dtype,
            kda=problem.is_kda,
            bounded=problem.lower_bound,
            l2norm=problem.l2norm,
            neg_eigval=problem.neg_eigval,
            update=problem.update,
            verify=problem.intermediates,
            varlen=problem.varlen,
            strides=problem.strides,
            wide=wide and problem.strides != "any",
            lanes=int(config["lanes"]),
            columns=int(config["columns"]),
            warps=int(config["warps"]),
            window=int(config["window"]),
            stagers=int(config["stagers"]),
            # A tree replaces the state between two tokens, so nothing of the last one may still be pending.
            overlap=bool(config["overlap"]) and problem.intermediates != "tree",
            streaming=bool(config["streaming"]),
            resident=int(config["resident"]),
        )

    @property
    def threads(self) -> int:
        return WARP * (self.warps + self.stagers)

    @property
    def groups(self) -> int:
        """Groups of lanes in a warp, each with its own columns."""
        return WARP // self.lanes

    @property
    def tile(self) -> int:
        """Columns of V per block."""
        return self.warps * self.groups * self.columns

    @property
    def tiles(self) -> int:
        """Blocks per (sequence, value head)."""
        return -(-self.v // self.tile)

    @property
    def pieces(self) -> int:
        """Chunks of K per lane."""
        return -(-self.k // (CHUNK * self.lanes))

    @property
    def per_lane(self) -> int:
        """K values per lane, padding included."""
        return self.pieces * CHUNK

    @property
    def padded_k(self) -> int:
        """K rounded up to what all lanes hold."""
        return self.per_lane * self.lanes

    @property
    def slots(self) -> int:
        """Warps that stage."""
        return self.stagers or self.warps

    @property
    def chunks_per_warp_lane(self) -> int:
        """Chunks of a row that one lane stages, when the 32 lanes of a warp share it."""
        return -(-self.padded_k // (CHUNK * WARP))

    @property
    def shared_bytes(self) -> int:
        """Static shared memory: two windows of q, k (and decays), of v, and two gates per token."""
        vectors = 3 if self.kda else 2
        return 2 * self.window * 4 * (vectors * self.padded_k + self.tile + 2)

    @property
    def wide_k(self) -> bool:
        """Whether states are accessed in vectors along K."""
        return self.wide and self.layout == "vk" and self.k % CHUNK == 0

    @property
    def wide_v(self) -> bool:
        """Whether states are accessed in vectors along V."""
        return self.wide and self.layout == "kv" and self.columns > 1 and self.v % self.columns == 0
