"""The recurrence step by step, all sequences and value heads of a block at once.

A block's states are held as ``[n * keys, K, group * V]``: the value heads that share a key head lie side by side,
so one product with a key (or query) row serves them all and no key is repeated. Sequences are sorted by length;
step t works on the prefix still alive, so nothing is padded and no state is kept per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.gates import normalise
from .budget import block_bytes
from .precision import full_precision
from .rows import BlockRows, Window
from .sequences import Block, Heads, Sequences, blocks
from .states import Slots, head_states, load_states, store_states
from .window_gates import WindowGates

__all__ = ["run_vectorized"]

#: Steps whose inputs are converted at once: enough to make that cheap, few enough to stay small beside a state.
_WINDOW = 16


def run_vectorized(
    call: Call, block_kib: int, lengths_on_host: bool | None = None, slots_on_host: bool | None = None
) -> torch.Tensor:
    """Run ``call`` in blocks of at most ``block_kib`` KiB of states; returns the output ``[B, T, HV, V]``.

    ``lengths_on_host`` and ``slots_on_host`` say what may be read on the host without waiting; None: the lengths
    if the call says so, the slots if they are on a CPU. False never reads them there.
    """
    out = torch.zeros(*call.v.shape, dtype=call.q.dtype, device=call.q.device) if call.out is None else call.out
    if not call.tokens:
        return out
    compute = torch.float64 if call.q.dtype is torch.float64 else torch.float32
    if lengths_on_host is None or call.cu_seqlens is None:
        lengths_on_host = call.lengths_on_host
    sequences = Sequences(call, lengths_on_host)
    slots_on_host = not call.q.is_cuda if slots_on_host is None else slots_on_host
    indices = _Indices(
        Slots.of(call.read_slots, sequences, slots_on_host),
        Slots.of(call.write_slots, sequences, slots_on_host),
        Slots.of(call.intermediate_rows, sequences, slots_on_host),
        None if call.parents is None else sequences.in_order(call.parents).to(torch.int64),
    )
    states = block_bytes(call, block_kib) // (call.key_dim * call.value_dim * compute.itemsize)
    with torch.no_grad(), full_precision(call.q.device):
        for block in blocks(sequences, call.hv, call.hv // call.h, states):
            _BlockRun(call, sequences, block, indices, compute).run(out)
    return out


@dataclass(frozen=True, slots=True)
class _Indices:
    """Slot, row and parent numbers of all sequences, in working order."""

    read: Slots | None
    write: Slots | None
    rows: Slots | None
    parents: torch.Tensor | None


class _BlockRun:
    """One block from its starting states to its final ones."""

    def __init__(self, call: Call, sequences: Sequences, block: Block, indices: _Indices, compute: torch.dtype) -> None:
        self.call, self.sequences, self.block, self.indices = call, sequences, block, indices
        self.heads: Heads = block.heads
        self.rows = BlockRows(sequences, block)
        self.gates = WindowGates(call, block.heads, compute)
        heads, device = block.heads, call.q.device
        shape = (block.n * heads.keys, call.key_dim, heads.group * call.value_dim)
        self.states = torch.empty(shape, dtype=compute, device=device)
        self.mask_lengths = None if sequences.on_host else sequences.device_lengths[block.first : block.last]

    def run(self, out: torch.Tensor) -> None:
        call, block = self.call, self.block
        pool = None if call.pool is None else head_states(call.pool, self.heads, call)
        load_states(pool, self.indices.read, block, self._by_head(block.n))
        tree = _Tree(self) if call.parents is not None else None
        out = out[:, :, self.heads.values]
        for t in range(0, self.sequences.longest(block), _WINDOW):
            self._run_window(self.rows.window(t, _WINDOW), tree, out)
        if pool is not None and self.indices.write is not None:
            alive = None if self.mask_lengths is None else self.mask_lengths > 0
            store_states(pool, self.indices.write.part(block.first, block.last), self._by_head(block.n), alive)

    def _by_head(self, n: int) -> torch.Tensor:
        """The first ``n`` sequences' states as a view ``[n, keys, group, K, V]``."""
        heads = self.heads
        states = self.states[: n * heads.keys]
        return states.view(n, heads.keys, self.call.key_dim, heads.group, self.call.value_dim).transpose(2, 3)

    def _run_window(self, window: Window, tree: _Tree | None, out: torch.Tensor) -> None:
        call, heads, n, width = self.call, self.heads, window.n, window.width
        compute = self.states.dtype
        q = window.take(call.q[:, :, heads.key_heads]).to(compute)
        k = window.take(call.k[:, :, heads.key_heads]).to(compute)
        if call.use_qk_l2norm:
            q, k = normalise(q), normalise(k)
        q = q * call.scale
        v = window.take(call.v[:, :, heads.values]).to(compute)
        g, beta = self.gates(window)
        decay = g.exp_()
        # [n, width, heads, ...] -> [n * keys, width, ...]: one step is then a strided view of each
        p = n * heads.keys
        q, k = (x.transpose(1, 2).reshape(p, width, -1) for x in (q, k))
        v = torch.unflatten(v, 2, (heads.keys, heads.group)).transpose(1, 2).reshape(p, width, -1)
        beta = torch.unflatten(beta, 2, (heads.keys, heads.group)).transpose(1, 2).reshape(p, width, heads.group)
        decay = torch.unflatten(decay, 2, (heads.keys, heads.group)).transpose(1, 2).flatten(0, 1)
        # [p, width, K or 1, group, 1] beside the states' [p, K, group, V]
        decay = decay.transpose(2, 3).unsqueeze(-1) if call.is_kda else decay[:, :, None, :, None]
        o = torch.empty_like(v)
        for w in range(width):
            live = self.sequences.live(self.block, window.t + w)
            if tree is not None:
                tree.load(window.t + w, live)
            self._step(live * heads.keys, slice(w, w + 1), q, k, v, beta, decay[:, w], o)
            if call.intermediates is not None:
                self._keep(window.t + w, live)
        o = o.view(n, heads.keys, width, heads.group, call.value_dim).transpose(1, 2).flatten(2, 3)
        window.write(o, out)

    def _step(
        self,
        p: int,
        w: slice,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        decay: torch.Tensor,
        o: torch.Tensor,
    ) -> None:
        """Step ``w`` of the window for the first ``p`` (sequence, key head) pairs."""
        heads, states = self.heads, self.states[:p]
        states.view(p, -1, heads.group, self.call.value_dim).mul_(decay[:p])
        u = torch.baddbmm(v[:p, w], k[:p, w], states, alpha=-1)  # v - S^T k, [p, 1, group * V]
        u.view(p, heads.group, -1).mul_(beta[:p, w.start, :, None])
        states.addcmul_(k[:p, w].transpose(1, 2), u)
        o[:p, w] = torch.bmm(q[:p, w], states)

    def _keep(self, t: int, live: int) -> None:
        """Store the states after step ``t`` for verification."""
        assert self.call.intermediates is not None
        assert self.indices.rows is not None
        buffer = head_states(self.call.intermediates[:, t], self.heads, self.call)
        rows = self.indices.rows.part(self.block.first, self.block.first + live)
        alive = None if self.mask_lengths is None else self.mask_lengths > t
        store_states(buffer, rows, self._by_head(live), alive)


class _Tree:
    """Token-tree verification: a step starts from the stored state of its parent."""

    def __init__(self, run: _BlockRun) -> None:
        block, rows = run.block, run.indices.rows
        assert run.indices.parents is not None
        assert rows is not None
        assert run.call.intermediates is not None
        self._run = run
        self._parents = run.indices.parents[block.first : block.last]
        device = self._parents.device
        mine = rows.part(block.first, block.last)
        numbers = torch.tensor(mine.host, dtype=torch.int64) if mine.device is None else mine.device
        self._rows = numbers.to(device)
        self._stored = head_states(run.call.intermediates, run.heads, run.call)
        self._start = run._by_head(block.n).clone()

    def load(self, t: int, live: int) -> None:
        """Put the states that step ``t`` starts from in place; without a stored row steps follow one another."""
        if not t or not self._stored.shape[0]:
            return
        parents, rows = self._parents[:live, t], self._rows[:live]
        states = self._run._by_head(live)
        # Beyond a sequence's end entries may be anything; what they lead to is not used.
        stored = self._stored[rows.clamp(min=0), parents.clamp(0, t - 1)].to(states.dtype)
        wide = (..., None, None, None, None)
        stored = torch.where((parents < 0)[wide], self._start[:live], stored)
        goes_back = rows >= 0
        if self._run.mask_lengths is not None:
            goes_back = goes_back & (self._run.mask_lengths > t)
        states.copy_(torch.where(goes_back[wide], stored, states))
