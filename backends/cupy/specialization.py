"""From a problem and a config to what the kernel is compiled for: the macros of ``kernels/shape.cuh``."""

from __future__ import annotations

from dataclasses import dataclass

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem

__all__ = ["MAX_DIM", "Specialization", "shared_bytes"]

#: Largest K and V: a state of 256 x 256 still fits the registers of one block's warps.
MAX_DIM = 256
_TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16", "float64": "double"}
_VERIFY = {"none": 0, "chain": 1, "tree": 2}


@dataclass(frozen=True, slots=True)
class Specialization:
    """Everything that is fixed when the kernel is compiled. Sizes of the batch, strides and scalars are not.

    Attributes:
        k, v: head dimensions; lanes, rows, warps, tokens, stream: the config (see ``configs.py``).
        io, state, step, gate: C++ types of q, k, v and out, of the pool, of the intermediate states, and of KDA's a.
        vk, unit, kda: state layout; innermost strides are 1; gates per key channel.
        verify: 0 no intermediate states, 1 chain, 2 tree.
    """

    k: int
    v: int
    lanes: int
    rows: int
    warps: int
    tokens: int
    stream: bool
    io: str
    state: str
    step: str
    gate: str
    vk: bool
    unit: bool
    kda: bool
    verify: int

    @classmethod
    def of(cls, problem: Problem, config: Config) -> Specialization:
        """The kernel that ``config`` means for ``problem``."""
        state = problem.state_dtype or problem.intermediate_dtype or "float32"
        return cls(
            k=problem.k,
            v=problem.v,
            lanes=int(config["lanes"]),
            rows=int(config["rows"]),
            warps=int(config["warps"]),
            tokens=int(config["tokens"]),
            stream=bool(config["stream"]),
            io=_TYPES[problem.io_dtype],
            state=_TYPES[state],
            step=_TYPES[problem.intermediate_dtype or "float32"],
            # GDN's gates are scalars, understood at run time: one kernel serves all their dtypes.
            gate=_TYPES[problem.a_dtype] if problem.is_kda else "float",
            vk=problem.state_layout == "vk",
            unit=problem.strides != "any",
            kda=problem.is_kda,
            verify=_VERIFY[problem.intermediates],
        )

    @property
    def threads(self) -> int:
        return 32 * self.warps

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
            "CONFIG_LANES": self.lanes,
            "CONFIG_ROWS": self.rows,
            "CONFIG_WARPS": self.warps,
            "CONFIG_TOKENS": self.tokens,
            "CONFIG_STREAM": int(self.stream),
            "IO_TYPE": self.io,
            "STATE_TYPE": self.state,
            "STEP_TYPE": self.step,
            "GATE_TYPE": self.gate,
            "STATE_VK": int(self.vk),
            "UNIT_STRIDES": int(self.unit),
            "IS_KDA": int(self.kda),
            "VERIFY_MODE": self.verify,
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())


def shared_bytes(k: int, lanes: int, rows: int, warps: int, tokens: int, kda: bool, vector: int) -> int:
    """Static shared memory of a block: two windows of staged tokens. ``vector`` as ``Shape::VECTOR``."""
    step = vector * lanes
    keys = -(-k // step) * step
    window, tile = warps * tokens, warps * (32 // lanes) * rows
    floats = window * ((3 if kda else 2) * keys + tile + 2) + (0 if kda else 4)
    return 2 * -(-4 * floats // 16) * 16
