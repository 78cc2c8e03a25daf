"""The float64 reference, written from the formula, with a running bound on any float32 evaluation of it.

The recurrence per sequence and value head, state ``S`` of shape ``[K, V]``:

    S <- exp(g) * S;   u = beta * (v - S^T k);   S <- S + k u^T;   o = S^T q

The bound. ``exp(g) <= 1`` and ``|1 - beta * ||k||^2| <= 1`` for normalised keys, so the step never amplifies an
error already made; what remains is the sum of the local rounding errors. With unit roundoff ``u = 2**-24``,
``h' = exp(g) S`` and ``m = 6 * sqrt(K)`` standing for the rounding of a sum of K terms in any order, the error
``E`` of one column of the state (in the 2-norm over K) obeys

    E <- E * max(exp g) * growth + u * [ ||(c_g + 1) h'|| + beta ||k|| (m + 2 c_n + 2) sum|h'||k|
                                         + beta ||k|| (c_beta + 4 + 2 c_n) (|v| + |d|) + 2 ||S|| ]
    |o - o_ref| <= ||q|| E + u (m + c_n + 2) sum|S||q|        (then half an ulp of the output's dtype)

``c_g``, ``c_beta``, ``c_n`` are the relative errors, in units of u, of the decay, of beta and of a normalised
vector; ``d = h'^T k``. Chunked forms evaluate the same sums from their parts (the state at the start of the chunk,
and each earlier token of the chunk), so cancellation between the parts is rounded too: there ``|h'|`` is replaced
by the majorant ``M' = sum of |parts|`` and the decays' errors accumulate over the chunk in ``F`` (``local_errors.py``).
All bounds include what underflow may do, :data:`UNDERFLOW`. Evaluations that cut sequences into segments: see
``segments.py``.

Only the states and ``E`` go token by token, of all sequences at once (``recurrence.py``, ``packing.py``); what needs no
more than the states is found for a block of tokens, or for a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...backend import Chunked
from .call import Call
from .local_errors import chunk_errors, token_errors
from .operands import CERTAIN, TYPICAL, UNIT, OperandRounding
from .packing import Packing
from .recurrence import accumulate_errors, advance
from .segments import Segments
from .tokens import F64, Tokens, on
from .verify_tree import VerifyTree

__all__ = ["Reference", "reference"]

#: Below 2**-126 float32 has no relative accuracy, and a GPU may flush to zero; a sum of K terms, or a gate times a
#: value, carries up to about 256 such errors.
UNDERFLOW = 2.0**-118
#: Most values that the states of a block of tokens may have together: what a CPU's cache holds; a GPU has room.
_BLOCK, _BLOCK_OF_GPU = 1 << 19, 1 << 23


@dataclass(frozen=True, slots=True)
class Reference:
    """Exact results and error bounds for the value heads in ``heads``; all tensors float64, on one device.

    Attributes:
        heads: the value heads computed, in the order of the head axes below.
        offsets: ``N + 1`` row offsets of the sequences into the B * T tokens.
        o, o_bound: ``[tokens, heads, V]``; rows no sequence covers are NaN.
        state, state_bound: final states ``[N, heads, K, V]`` and, per column, ``[N, heads, V]``.
        steps, steps_bound: states after each token ``[tokens, heads, K, V]``, ``[tokens, heads, V]``; None unless
            the call stores intermediate states.
        o_noise, state_noise: like ``o`` and ``state``: the root mean square error that rounded operands will typically
            cause; None for evaluations in float32.
        state_scatter: ``[3, N, heads]``, of the errors whose size ``state_noise`` is, see ``OperandRounding.scatter``.
    """

    heads: tuple[int, ...]
    offsets: tuple[int, ...]
    o: torch.Tensor
    o_bound: torch.Tensor
    state: torch.Tensor
    state_bound: torch.Tensor
    steps: torch.Tensor | None
    steps_bound: torch.Tensor | None
    o_noise: torch.Tensor | None = None
    state_noise: torch.Tensor | None = None
    state_scatter: torch.Tensor | None = None

    def lasting(self) -> tuple[torch.Tensor, ...]:
        """All its tensors: nothing may change them."""
        exact = (self.o, self.o_bound, self.state, self.state_bound, self.steps, self.steps_bound)
        all_of_them = (*exact, self.o_noise, self.state_noise, self.state_scatter)
        return tuple(t for t in all_of_them if t is not None)

    def places(self) -> tuple[int, ...]:
        """What it describes."""
        return (*self.heads, *self.offsets)


def reference(
    call: Call,
    heads: Sequence[int] | None = None,
    chunk: int | Chunked | None = None,
    initial: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Reference:
    """Evaluate ``call`` in float64 for the value heads in ``heads`` (default: all). Writes nothing.

    Args:
        call: canonical arguments. Reads its tensors (copying them to ``device`` where they are elsewhere).
        heads: value heads to compute; heads are independent, so a few stand for all where all would take too long.
        chunk: bound for chunked evaluations with chunks of this many tokens, in float32 or with rounded operands
            (``operands.py``), of whole sequences or of segments (``segments.py``); None for token-by-token ones.
        initial: ``[N, heads, K, V]`` float64 start states in place of the pool's (a caller that keeps exact
            states across calls).
        device: where to compute and leave the results. A GPU's float64 is as good, and much faster on large states,
            where one trusts it more than the kernel that is judged.
    """
    chunked = chunk if isinstance(chunk, Chunked) else Chunked(chunk or 0)
    device = torch.device(device)
    chosen = tuple(range(call.hv)) if heads is None else tuple(heads)
    index = torch.tensor(chosen, dtype=torch.int64, device=device)
    offsets = call.offsets if call.lengths_on_host else tuple(on(call.cu_seqlens, "cpu").tolist())
    packing = Packing.of(offsets, device)
    start = _start_states(call, index, len(offsets) - 1) if initial is None else on(initial, device).to(F64)
    walk = _Walk(call, packing, Tokens.of(call, index, packing.rows, chunked.tokens), start, chunked)
    walk.run()

    back = torch.tensor(packing.order, dtype=torch.int64, device=device).argsort()
    v, operands, rows = call.value_dim, walk.operands, packing.rows

    def of_tokens(packed: torch.Tensor, elsewhere: float) -> torch.Tensor:
        full = packed.new_full((call.tokens, *packed.shape[1:]), elsewhere)
        full[rows] = packed
        return full

    o_bound, state_bound = walk.o_bound + UNDERFLOW, walk.error[back, :, :v]
    o_noise = state_noise = state_scatter = None
    if operands is not None:
        o_bound = o_bound + CERTAIN * UNIT * operands.o.sqrt()
        state_bound = state_bound + CERTAIN * UNIT * operands.column[back, :, :v].sqrt()
        o_noise = of_tokens(TYPICAL * UNIT * operands.o_typical.sqrt(), 0.0)
        state_noise = TYPICAL * UNIT * operands.state[back, ..., :v].sqrt()
        state_scatter = operands.scatter(v)[:, back]
    # An empty sequence keeps its bits.
    ran = (packing.lengths > 0)[back, None, None]
    state_bound = torch.where(ran, state_bound + UNDERFLOW, state_bound)
    if walk.steps_bound is not None:
        walk.steps_bound[rows] += UNDERFLOW
    return Reference(
        chosen,
        offsets,
        of_tokens(walk.o, math.nan),
        of_tokens(o_bound, 0.0),
        walk.h[back, ..., :v],
        state_bound,
        walk.steps,
        walk.steps_bound,
        o_noise,
        state_noise,
        state_scatter,
    )


def _start_states(call: Call, index: torch.Tensor, n: int) -> torch.Tensor:
    start = torch.zeros(n, len(index), call.key_dim, call.value_dim, dtype=F64, device=index.device)
    if call.pool is None or call.read_slots is None:
        return start
    for i, slot in enumerate(call.read_slots.tolist()):
        if slot >= 0:
            state = on(call.pool[slot], index.device)[index].to(F64)
            start[i] = state if call.state_layout == "kv" else state.transpose(-1, -2)
    return start


class _Walk:
    """One evaluation. Sequences in the packing's order, tokens in its positions; ``steps`` in the call's rows.

    Attributes:
        h, error: ``[N, heads, K, columns]``, ``[N, heads, columns]``: current states and their errors. The columns are
            V, or with segments those that :class:`Segments` describes.
        o, o_bound: ``[positions, heads, V]``.
        steps, steps_bound: as of :class:`Reference`.
    """

    def __init__(self, call: Call, packing: Packing, tokens: Tokens, start: torch.Tensor, chunked: Chunked) -> None:
        self.packing, self.tokens, self.chunk = packing, tokens, chunked.tokens
        start = start[list(packing.order)].clone()  # also where there is none
        heads, k_dim, v_dim = start.shape[1:]
        cut = chunked.cut if chunked.tokens and chunked.cut < packing.longest else 0
        self.segments = Segments(cut, start) if cut else None
        self.h = start.clone() if self.segments is None else self.segments.h
        self.v = tokens.v if self.segments is None else Segments.values(tokens.v, k_dim)
        self.error = self.h.new_zeros(len(start), heads, self.h.shape[-1])
        self.o, self.o_bound = torch.empty_like(tokens.v), torch.empty_like(tokens.v)
        self.operands = OperandRounding(len(packing.rows), self.h, v_dim) if chunked.rounded else None
        self.steps = self.steps_bound = self.tree = None
        if call.intermediates is not None:
            self.steps = start.new_full((call.tokens, heads, k_dim, v_dim), math.nan)
            self.steps_bound = start.new_zeros(call.tokens, heads, v_dim)
            if call.parents is not None:
                self.tree = VerifyTree.of(call, packing, start, self.steps, self.steps_bound)
        most = (_BLOCK_OF_GPU if start.is_cuda else _BLOCK) // max(1, math.prod(self.h.shape[1:]))
        self._block = most if self.tree is None else 0  # a tree says what each place starts from
        # The same memory for all blocks: new one costs a CPU more than what is done there.
        self._after = self.h.new_empty(max(packing.live(0), min(most, len(packing.rows))), *self.h.shape[1:])
        self._before = self._after if self.chunk else torch.empty_like(self._after)

    def run(self) -> None:
        """All tokens of all sequences."""
        longest = self.packing.longest
        if self.chunk:
            for first in range(0, longest, self.chunk):
                self._chunk(first, min(first + self.chunk, longest))
            return
        for first, last in self.packing.blocks(0, longest, self._block):
            states = self._states(first, last)
            self._errors(first, last, *token_errors(self.tokens, self.packing.span(first, last), *states))

    def _chunk(self, first: int, last: int) -> None:
        packing, tokens, segments, live = self.packing, self.tokens, self.segments, self.packing.live(first)
        if self.tree is not None:
            self.tree.load_states(first, self.h)
            self.tree.load_errors(first, self.error)
        if segments is not None and first % segments.tokens == 0:
            segments.begin(live, self.error, self.operands)
        start, rectangle, span = self.h[:live].clone(), packing.rectangle(first, last), packing.span(first, last)
        if self.operands is not None:
            which = rectangle.tokens, rectangle.there
            self.operands.add(*which, start, tokens.q, tokens.k, self.v, tokens.decay, tokens.beta)
        missed = torch.cat([self._states(*block)[0] for block in packing.blocks(first, last, self._block)])
        errors = chunk_errors(tokens, span, rectangle, self.v[span], missed, start, self.chunk)
        self._errors(first, last, errors.local, errors.shown)
        self.error[:live] += errors.formed
        if segments is not None and last % segments.tokens == 0:
            segments.join(packing.live(last), self.error, self.operands)
        if self.steps_bound is not None:
            ends = packing.starts[:live] + packing.lengths[:live].clamp(max=last) - 1
            self.steps_bound[ends] = self.error[:live, :, : self.steps_bound.shape[-1]]

    def _states(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance the states; set ``o`` and ``steps``.

        Returns ``v - d``, and the states before (but for the decay) and after each token, see :func:`advance`: valid
        until the next block. In chunks those before are not kept.
        """
        if self.tree is not None:
            self.tree.load_states(first, self.h)
        tokens, span, width = self.tokens, self.packing.span(first, last), self.o.shape[-1]
        count = span.stop - span.start
        before, after = self._before[:count], self._after[:count]
        decay, k, v, beta = (x[span] for x in (tokens.decay, tokens.k, self.v, tokens.beta))
        missed = advance(self.h, self.packing.sizes[first:last], decay, k, v, beta, before, after)
        self.o[span] = (tokens.q[span][..., None, :] @ after[..., :width]).squeeze(-2)
        if self.steps is not None:
            self.steps[self.packing.rows[span]] = after[..., :width]
        return missed, before, after

    def _errors(self, first: int, last: int, local: torch.Tensor, shown: torch.Tensor) -> None:
        """Advance the errors; set ``o_bound`` and ``steps_bound``."""
        tokens, v, base = self.tokens, self.o.shape[-1], self.packing.bases[first]
        for begin, end in self.packing.blocks(first, last, len(local) if self.tree is None else 0):
            if self.tree is not None:
                self.tree.load_errors(begin, self.error)
            span = self.packing.span(begin, end)
            here = slice(span.start - base, span.stop - base)
            errors = accumulate_errors(self.error, self.packing.sizes[begin:end], tokens.growth[span], local[here])
            errors = errors[..., :v]
            self.o_bound[span] = tokens.q[span].norm(dim=-1, keepdim=True) * errors + shown[here]
            if self.steps_bound is not None:
                self.steps_bound[self.packing.rows[span]] = errors
