"""From a Call to the parameter block, and into the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...registry.backend import Pinned
from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call
from . import parameters as at
from .kernel import Kernel

__all__ = ["Launcher"]

#: Tokens staged at a time: enough to spread the cost of a chunk's start, few enough to stay in a 1 MB cache.
CHUNK = 32
#: State elements times tokens below which waking other threads costs more than they save.
_WORTH_SHARING = 1 << 17
#: Tasks per worker below which V is split between tasks.
_TASKS_PER_WORKER = 2
#: Where the block holds each tensor's address.
_PLACES = {
    "A_log": at.A_LOG, "a": at.A, "dt_bias": at.DT_BIAS, "q": at.Q, "k": at.KEY, "v": at.VALUE, "b": at.B,
    "pool": at.POOL, "read_slots": at.READ, "write_slots": at.WRITE, "cu_seqlens": at.CU_SEQLENS,
    "intermediates": at.STEPS, "intermediate_rows": at.ROWS, "parents": at.PARENTS, "out": at.OUT,
}  # fmt: skip
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@dataclass(frozen=True, slots=True)
class Launcher:
    """A bound runner: takes a :class:`Call` on the CPU, writes ``call.out``, the pool and the intermediate states.

    Attributes:
        kernel: what to run.
        v_tile: columns of V per tile: 16, 32, 64 or 128.
    """

    kernel: Kernel
    v_tile: int

    def __call__(self, call: Call) -> torch.Tensor:
        out = call.out
        if out is None:
            out = torch.zeros(call.v.shape, dtype=call.q.dtype)
        if call.n and call.tokens:
            self.kernel(np.array(self._block(call, out), np.int64), _reals(call))
        return out

    def pin(self, call: Call) -> Pinned | None:
        """The runner for calls like ``call``: the block is filled in once, and only addresses are written per call."""
        if call.out is None:
            return None
        given = [i for i, name in enumerate(TENSORS) if getattr(call, name) is not None]
        places = np.array([_PLACES[TENSORS[i]] for i in given])
        reals, kernel = _reals(call), self.kernel
        blocks: dict[int, NDArray[np.int64]] = {}  # how work is divided depends on the number of threads

        def run(tensors: tuple[torch.Tensor, ...]) -> None:
            block = blocks.get(torch.get_num_threads())
            if block is None:
                blocks[torch.get_num_threads()] = block = np.array(self._block(like, tensors[-1]), np.int64)
            block = block.copy()  # the kernel writes to it, and other threads may be running
            block[places] = [tensors[i].data_ptr() for i in given]
            kernel(block, reals)

        # A call of its shapes that keeps nobody's memory alive.
        like = call.replace(**{TENSORS[i]: _without_memory(getattr(call, TENSORS[i])) for i in given})
        return run

    def _block(self, call: Call, out: torch.Tensor) -> list[int]:
        """The integers of the parameter block."""
        batch, length, heads, dim = call.v.shape
        block = [0] * at.INTEGERS
        for place, tensor in (
            (at.Q, call.q),
            (at.KEY, call.k),
            (at.VALUE, call.v),
            (at.A, call.a),
            (at.B, call.b),
            (at.A_LOG, call.A_log),
            (at.DT_BIAS, call.dt_bias),
            (at.OUT, out),
        ):
            _describe(block, place, tensor, tensor.stride())
        for place, states in ((at.POOL, call.pool), (at.STEPS, call.intermediates)):
            if states is not None:
                *outer, x, y = states.stride()
                _describe(block, place, states, (*outer, x, y) if call.state_layout == "kv" else (*outer, y, x))
        for place, indices in (
            (at.CU_SEQLENS, call.cu_seqlens),
            (at.READ, call.read_slots),
            (at.WRITE, call.write_slots),
            (at.ROWS, call.intermediate_rows),
            (at.PARENTS, call.parents),
        ):
            if indices is not None:
                block[place : place + 2] = indices.data_ptr(), indices.element_size()
        if call.parents is not None:
            block[at.PARENTS + 2 : at.PARENTS + 4] = call.parents.stride()

        block[at.N] = n = call.n
        block[at.LENGTH] = length
        block[at.GROUP] = heads // call.h
        block[at.HEADS] = heads
        block[at.KEY_DIM] = key_dim = call.key_dim
        block[at.VALUE_DIM] = dim
        block[at.IS_KDA] = call.is_kda
        block[at.BOUNDED] = call.lower_bound is not None
        block[at.L2NORM] = call.use_qk_l2norm
        self._divide(block, batch * length, n * heads, key_dim, dim)
        return block

    def _divide(self, block: list[int], tokens: int, pairs: int, key_dim: int, dim: int) -> None:
        """Workers, columns per task, and each worker's scratch, for ``pairs`` of a sequence and a value head."""
        workers = min(torch.get_num_threads(), self.kernel.threads)
        if tokens * block[at.HEADS] * key_dim * dim < _WORTH_SHARING:
            workers = 1
        tiles = -(-dim // self.v_tile)
        splits = 1 if workers == 1 else min(tiles, -(-_TASKS_PER_WORKER * workers // pairs))
        span = -(-tiles // splits) * self.v_tile
        block[at.WORKERS] = workers
        block[at.V_TILE] = self.v_tile
        block[at.V_SPAN] = span

        # Without a layout the longest length is not looked up: no sequence has more tokens than there are.
        block[at.CHUNK] = chunk = min(CHUNK, tokens if block[at.CU_SEQLENS] else block[at.LENGTH])
        row = _padded(key_dim)
        columns = _padded(min(span, dim))
        block[at.ROW], block[at.VALUE_ROW] = 4 * row, 4 * columns
        sizes = (
            (at.VALUES, 4 * 4 * row * chunk),  # the size before VALUES: four rows of K per token
            (at.BETAS, 4 * columns * chunk),
            (at.GATES, 4 * _padded(chunk)),
            (at.BIAS, 4 * _padded(chunk)),
            (at.DELTA, 4 * max(row, _padded(chunk))),
            (at.TILE, 4 * self.v_tile),
            (at.SCRATCH, 4 * key_dim * columns),
        )
        offset = 0
        for place, size in sizes:
            offset += size
            block[place] = offset


def _reals(call: Call) -> NDArray[np.float64]:
    lower_bound = 0.0 if call.lower_bound is None else call.lower_bound
    factor = 2.0 if call.allow_neg_eigval else 1.0
    return np.array((call.softplus_beta, call.softplus_threshold, call.scale, lower_bound, factor), np.float64)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype at address 0."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _describe(block: list[int], place: int, tensor: torch.Tensor, strides: Sequence[int]) -> None:
    block[place] = tensor.data_ptr()
    block[place + at.CODE] = _CODES[tensor.dtype]
    start = place + at.STRIDES
    block[start : start + len(strides)] = strides


def _padded(count: int) -> int:
    return -(-count // 16) * 16
