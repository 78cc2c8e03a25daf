"""From a problem and a config to what the kernel is compiled for: the macros of ``kernels/shape.cuh``."""

from __future__ import annotations

from dataclasses import dataclass

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem

__all__ = ["MAX_DIM", "Specialization", "landing_bytes", "stage_bytes"]

#: Largest K and V: a state of 256 x 256 still fits the registers of one block's warps.
MAX_DIM = 256
_TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16", "float64": "double"}
_INDICES = {None: "int", "int32": "int", "int64": "int64"}
_VERIFY = {"none": 0, "chain": 1, "tree": 2}


@dataclass(frozen=True, slots=True)
class Specialization:
    """Everything that is fixed when the kernel is compiled. Sizes of the batch, strides and scalars are not.

    Attributes:
        k, v: head dimensions; sharing: value heads per query/key head.
        lanes, rows, warps, helpers, staged, tokens, stream, resident: the config (see ``configs.py``).
        io, state, step: C++ types of q, k, v and out, of the pool, and of the intermediate states.
        a, b, A_log, bias: of the gate inputs; slot, cu, row, parent: of the indices.
        vk, unit: state layout; innermost strides are 1.
        kda, norm, bounded: gates per key channel; q and k are normalised; the decay has a lower bound.
        varlen, read, write, in_place: packed by offsets; which states are touched.
        verify: 0 no intermediate states, 1 chain, 2 tree.
    """

    k: int
    v: int
    sharing: int
    lanes: int
    rows: int
    warps: int
    helpers: int
    staged: bool
    landing: bool
    tokens: int
    stream: bool
    resident: int
    io: str
    state: str
    step: str
    a: str
    b: str
    A_log: str
    bias: str
    slot: str
    cu: str
    row: str
    parent: str
    vk: bool
    unit: bool
    kda: bool
    norm: bool
    bounded: bool
    varlen: bool
    read: bool
    write: bool
    in_place: bool
    verify: int

    @classmethod
    def of(cls, problem: Problem, config: Config) -> Specialization:
        """The kernel that ``config`` means for ``problem``."""
        state = problem.state_dtype or problem.intermediate_dtype or "float32"
        return cls(
            k=problem.k,
            v=problem.v,
            sharing=problem.hv // problem.h,
            lanes=int(config["lanes"]),
            rows=int(config["rows"]),
            warps=int(config["warps"]),
            helpers=int(config["helpers"]),
            staged=bool(config["staged"]),
            landing=bool(config["landing"]),
            tokens=int(config["tokens"]),
            stream=bool(config["stream"]),
            resident=int(config["resident"]),
            io=_TYPES[problem.io_dtype],
            state=_TYPES[state],
            step=_TYPES[problem.intermediate_dtype or "float32"],
            a=_TYPES[problem.a_dtype],
            b=_TYPES[problem.b_dtype],
            A_log=_TYPES[problem.A_log_dtype],
            bias=_TYPES[problem.dt_bias_dtype],
            slot=_INDICES[problem.index_dtype],
            cu=_INDICES[problem.cu_dtype],
            row=_INDICES[problem.row_dtype],
            parent=_INDICES[problem.parent_dtype],
            vk=problem.state_layout == "vk",
            unit=problem.strides != "any",
            kda=problem.is_kda,
            norm=problem.l2norm,
            bounded=problem.lower_bound,
            varlen=problem.varlen,
            read=problem.update != "none",
            write=problem.update in ("in_place", "separate"),
            in_place=problem.update == "in_place",
            verify=_VERIFY[problem.intermediates],
        )

    @property
    def threads(self) -> int:
        return 32 * (self.warps + self.helpers)

    @property
    def tile(self) -> int:
        """Rows of V per block."""
        return self.warps * (32 // self.lanes) * self.rows

    @property
    def tiles(self) -> int:
        return -(-self.v // self.tile)

    def options(self) -> tuple[str, ...]:
        """Compiler options that name this specialisation, in a fixed order."""
        values = {
            "KEY_DIM": self.k,
            "VALUE_DIM": self.v,
            "HEAD_GROUP": self.sharing,
            "CONFIG_LANES": self.lanes,
            "CONFIG_ROWS": self.rows,
            "CONFIG_WARPS": self.warps,
            "CONFIG_HELPERS": self.helpers,
            "CONFIG_STAGED": int(self.staged),
            "CONFIG_LANDING": int(self.landing),
            "CONFIG_TOKENS": self.tokens,
            "CONFIG_STREAM": int(self.stream),
            "CONFIG_RESIDENT": self.resident,
            "IO_TYPE": self.io,
            "STATE_TYPE": self.state,
            "STEP_TYPE": self.step,
            "A_TYPE": self.a,
            "B_TYPE": self.b,
            "A_LOG_TYPE": self.A_log,
            "BIAS_TYPE": self.bias,
            "SLOT_INDEX": self.slot,
            "CU_INDEX": self.cu,
            "ROW_INDEX": self.row,
            "PARENT_INDEX": self.parent,
            "STATE_VK": int(self.vk),
            "UNIT_STRIDES": int(self.unit),
            "IS_KDA": int(self.kda),
            "L2_NORM": int(self.norm),
            "HAS_LOWER_BOUND": int(self.bounded),
            "IS_VARLEN": int(self.varlen),
            "READS_STATE": int(self.read),
            "WRITES_STATE": int(self.write),
            "IS_IN_PLACE": int(self.in_place),
            "VERIFY_MODE": self.verify,
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())


def stage_bytes(k: int, config: Config, kda: bool, vector: int) -> int:
    """Static shared memory of a block that stages tokens: two windows. ``vector`` as ``Shape::VECTOR``."""
    lanes, warps = int(config["lanes"]), int(config["warps"])
    window = (int(config["helpers"]) or warps) * int(config["tokens"])
    tile = warps * (32 // lanes) * int(config["rows"])
    floats = window * ((3 if kda else 2) * _padded(k, lanes, vector) + tile + 4) + (0 if kda else 4)
    return 2 * -(-4 * floats // 16) * 16


def landing_bytes(k: int, config: Config, vector: int) -> int:
    """The same of a block whose states land in shared memory, at most."""
    lanes = int(config["lanes"])
    values = int(config["rows"]) * _padded(k, lanes, vector) // lanes
    return 32 * int(config["warps"]) * values * 16 // vector


def _padded(k: int, lanes: int, vector: int) -> int:
    return -(-k // (vector * lanes)) * vector * lanes
