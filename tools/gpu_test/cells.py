"""The bench's cells: shapes that serving has, and their tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.describe import describe
from ...registry.ops.fused_sigmoid_gating.problem import Problem, StateLayout

if TYPE_CHECKING:
    from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["CELLS", "DIM", "SETS", "Cell", "make_calls", "select"]

#: Sets of slots that launches take turns with, so that each finds its states where serving does: in memory.
SETS = 8
#: K and V.
DIM = 128
_WIDTH = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Cell:
    """``n`` sequences of ``length`` tokens; bfloat16 q, k, v; K = V = 128; L2 norm; GDN gates.

    Attributes:
        h, hv: query/key heads and value heads.
        state: dtype of the pool. layout: its layout.
    """

    n: int
    length: int
    h: int
    hv: int
    state: str
    layout: StateLayout

    @property
    def case(self) -> str:
        """Its name in tables. Short sequences have float32 states unless the name says otherwise."""
        if self.length == 1:
            name = f"decode N={self.n} H={self.h} HV={self.hv} {self.state}"
        else:
            name = f"mixed {self.n}x{self.length} H={self.h} HV={self.hv}"
            name += "" if self.state == "float32" else f" {self.state}"
        return name if self.layout == "vk" else f"{name} {self.layout}"

    @property
    def least_bytes(self) -> int:
        """States read and written; q, k, v, o, a and b."""
        states = 2 * self.n * self.hv * DIM * DIM * _WIDTH[self.state]
        return states + 2 * self.n * self.length * (2 * DIM * (self.h + self.hv) + 2 * self.hv)

    @property
    def kind(self) -> tuple[int, int, str, str, bool]:
        """Cells of one kind share their compiled kernels."""
        return self.h, self.hv, self.state, self.layout, self.length == 1

    def problem(self, arch: int) -> Problem:
        """What its calls are dispatched as, in a CUDA graph."""
        spec = CaseSpec(
            self.case,
            (self.length,) * self.n,
            h=self.h,
            hv=self.hv,
            k=DIM,
            v=DIM,
            state_dtype=self.state,
            state_layout=self.layout,
        )
        return describe(spec, "cuda", arch, "graph")


def _cells() -> tuple[Cell, ...]:
    shapes = ((1, 1), (4, 1), (16, 1), (64, 1), (256, 1), (16, 4), (64, 4), (16, 16), (1, 16), (1, 64))
    in_kv = ((1, 1), (16, 1), (64, 1), (256, 1), (16, 4))
    heads, states = ((16, 32), (4, 8)), ("float32", "bfloat16")
    made = [Cell(n, t, h, hv, state, "vk") for state, (h, hv), (n, t) in product(states, heads, shapes)]
    made += [Cell(n, t, h, hv, state, "kv") for state, (h, hv), (n, t) in product(states, heads, in_kv)]
    return tuple(made)


#: Those that matter most first: a budget may not suffice for all.
CELLS = _cells()


def select(pattern: str | None, quick: bool) -> tuple[Cell, ...]:
    """Cells whose name the regular expression finds; ``quick``: HV = 32, float32 states, layout vk.

    Raises ``re.error`` for what is no regular expression.
    """
    wanted = re.compile(pattern or "")
    return tuple(
        cell
        for cell in CELLS
        if wanted.search(cell.case) and (not quick or (cell.hv, cell.state, cell.layout) == (32, "float32", "vk"))
    )


def make_calls(cell: Cell, sets: int = SETS, device: str = "cuda") -> list[Call]:
    """The cell's call on each of ``sets`` sets of slots of one pool. Made on the device: a pool may be 4 GB."""
    import torch

    from ...registry.ops.fused_sigmoid_gating.dtypes import dtype_of
    from ...registry.ops.fused_sigmoid_gating.validate import canonical_call

    g = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    tokens, half = cell.n * cell.length, torch.bfloat16
    pool = torch.empty(cell.n * sets, cell.hv, DIM, DIM, device=device, dtype=dtype_of(cell.state))
    pool.normal_(0, 0.1, generator=g)
    slots = torch.arange(cell.n * sets, device=device, dtype=torch.int32).view(sets, cell.n)
    call = canonical_call(
        torch.log(torch.rand(cell.hv, generator=g, device=device) * 2 + 0.01),
        draw(1, tokens, cell.hv).to(half),
        draw(cell.hv) * 0.5,
        1.0,
        20.0,
        draw(1, tokens, cell.h, DIM).to(half),
        draw(1, tokens, cell.h, DIM).to(half),
        draw(1, tokens, cell.hv, DIM).to(half),
        draw(1, tokens, cell.hv).to(half),
        pool,
        slots[0],
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=torch.arange(0, tokens + 1, cell.length, device=device, dtype=torch.int32),
        state_layout=cell.layout,
        max_seqlen=cell.length,
    )
    call.out = torch.empty_like(call.v)
    return [call.replace(read_slots=chosen) for chosen in slots]
