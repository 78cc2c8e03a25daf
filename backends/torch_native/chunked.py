"""The chunkwise form: a chunk of C tokens costs a few matrix products instead of C rank-one updates.

With S the state at the start of the chunk and G, D as in ``chunk_terms``:

    A[t, s] = beta_t exp(D[t, s]) k_t.k_s  (s < t);     (I + A) U = beta (V - exp(G) K S)
    O = exp(G) Q S + tril(exp(D) Q K^T) U;              S <- exp(G_C) S + sum_s exp(D[C, s]) k_s u_s^T

Sequences are sorted by length and chunk step c works on those still alive; a sequence's last chunk is filled up
with tokens that change nothing. Only the tokens of the chunk at hand are converted.
"""

from __future__ import annotations

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.gates import normalise
from .budget import block_bytes
from .chunk_terms import gdn_terms
from .chunk_terms_kda import kda_terms
from .precision import full_precision
from .rows import BlockRows, Window
from .sequences import Block, Heads, Sequences, blocks
from .states import Slots, head_states, load_states, store_states
from .triangular import solve_unit_lower
from .window_gates import WindowGates

__all__ = ["ChunkStep", "run_chunked", "state_bytes"]


def state_bytes(call: Call, chunk: int, compute: torch.dtype) -> int:
    """Working memory per (sequence, value head): its state, and what is alive at the widest point of a chunk."""
    K, V = call.key_dim, call.value_dim
    per_token = 5 * K + 4 * V + 4 * chunk
    if call.is_kda:
        per_token += 4 * K
    return compute.itemsize * (K * V + chunk * per_token)


def run_chunked(call: Call, chunk: int, block_kib: int, slots_on_host: bool | None = None) -> torch.Tensor:
    """Run ``call`` in chunks of ``chunk`` tokens (a power of two); returns the output ``[B, T, HV, V]``.

    Blocks of sequences and heads are cut so that a block works in about ``block_kib`` KiB.
    ``slots_on_host=False`` never reads slot numbers on the host; None: only where they are on a CPU.
    """
    out = torch.zeros(*call.v.shape, dtype=call.q.dtype, device=call.q.device) if call.out is None else call.out
    if not call.tokens:
        return out
    compute = torch.float64 if call.q.dtype is torch.float64 else torch.float32
    sequences = Sequences(call, on_host=True)
    slots_on_host = not call.q.is_cuda if slots_on_host is None else slots_on_host
    read = Slots.of(call.read_slots, sequences, slots_on_host)
    write = Slots.of(call.write_slots, sequences, slots_on_host)
    states = block_bytes(call, block_kib) // state_bytes(call, chunk, compute)
    with torch.no_grad(), full_precision(call.q.device):
        for block in blocks(sequences, call.hv, call.hv // call.h, states):
            _run_block(call, sequences, block, chunk, read, write, out)
    return out


def _run_block(
    call: Call,
    sequences: Sequences,
    block: Block,
    chunk: int,
    read: Slots | None,
    write: Slots | None,
    out: torch.Tensor,
) -> None:
    heads = block.heads
    step = ChunkStep(call, heads)
    rows = BlockRows(sequences, block)
    states = torch.empty(block.n * heads.count, call.key_dim, call.value_dim, dtype=step.compute, device=call.q.device)
    by_head = states.view(block.n, heads.keys, heads.group, call.key_dim, call.value_dim)
    pool = None if call.pool is None else head_states(call.pool, heads, call)
    load_states(pool, read, block, by_head)
    out = out[:, :, heads.values]
    for t in range(0, sequences.longest(block), chunk):
        window = rows.window(t, chunk)
        o, _ = step(window, states[: window.n * heads.count])
        window.write(o, out)
    if pool is not None and write is not None:
        store_states(pool, write.part(block.first, block.last), by_head)


class ChunkStep:
    """One chunk of every sequence of a window, for some heads."""

    def __init__(self, call: Call, heads: Heads) -> None:
        self.call, self.heads = call, heads
        self.compute = torch.float64 if call.q.dtype is torch.float64 else torch.float32
        self.gates = WindowGates(call, heads, self.compute)

    def __call__(self, window: Window, S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs ``[n, width, heads, V]`` and next states from ``S [X, K, V]``.

        Without autograd ``S`` itself becomes the next state; with it everything is out of place.
        """
        call, heads, n = self.call, self.heads, window.n
        C = 1 << (window.width - 1).bit_length()
        X = n * heads.count
        kq = self._keys_and_queries(window, C)
        v = self._heads_first(window.take(call.v[:, :, heads.values]), C)  # [X, C, V]
        g, beta = (self._heads_first(x, C) for x in self.gates(window))
        terms = kda_terms(kq, g) if call.is_kda else gdn_terms(kq, g)
        beta = beta[:, :, None]
        A = terms.scores[:, :, 0] * beta
        read = torch.bmm(terms.reads.view(X, 2 * C, -1), S).view(X, C, 2, -1)
        writes = terms.writes.transpose(1, 2)
        if not torch.is_grad_enabled():
            U = solve_unit_lower(A, v.sub_(read[:, :, 0]).mul_(beta))
            o = torch.bmm(terms.scores[:, :, 1], U).add_(read[:, :, 1]).mul_(call.scale)
            S.mul_(terms.total).baddbmm_(writes, U)
        else:
            U = torch.linalg.solve_triangular(A, beta * (v - read[:, :, 0]), upper=False, unitriangular=True)
            o = torch.baddbmm(read[:, :, 1], terms.scores[:, :, 1], U) * call.scale
            S = torch.baddbmm(S * terms.total, writes, U)
        return torch.unflatten(o, 0, (n, heads.count)).transpose(1, 2)[:, : window.width], S

    def _heads_first(self, x: torch.Tensor, C: int) -> torch.Tensor:
        """``[n, width, heads, ...]`` to a new ``[n * heads, C, ...]`` in the compute dtype, zero beyond width."""
        n, width, heads = x.shape[:3]
        if torch.is_grad_enabled():
            x = x.to(self.compute).transpose(1, 2).flatten(0, 1)
            return torch.cat([x, x.new_zeros(n * heads, C - width, *x.shape[2:])], 1)
        new = torch.empty(n, heads, C, *x.shape[3:], dtype=self.compute, device=x.device)
        new[:, :, :width].copy_(x.transpose(1, 2))
        new[:, :, width:].zero_()
        return new.flatten(0, 1)

    def _keys_and_queries(self, window: Window, C: int) -> torch.Tensor:
        """``[n * keys, C, 2, K]``: k (index 0) and q (1), normalised where the call says so, q not yet scaled."""
        call, n, width = self.call, window.n, window.width
        k, q = (window.take(x[:, :, self.heads.key_heads]) for x in (call.k, call.q))
        if torch.is_grad_enabled():
            kq = self._heads_first(torch.stack([k, q], -2), C)
            return normalise(kq) if call.use_qk_l2norm else kq
        kq = torch.empty(n, self.heads.keys, C, 2, call.key_dim, dtype=self.compute, device=k.device)
        for i, x in enumerate((k, q)):
            kq[:, :, :width, i].copy_(x.transpose(1, 2))
        kq[:, :, width:].zero_()
        if call.use_qk_l2norm:
            # As gates.normalise, one pass fewer.
            kq.div_(torch.linalg.vecdot(kq, kq).add_(1e-6).sqrt_().unsqueeze(-1))
        return kq.flatten(0, 1)
