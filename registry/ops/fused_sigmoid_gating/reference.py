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
by the majorant ``M' = sum of |parts|`` and the decays' errors accumulate over the chunk in ``F``. All bounds include
what underflow may do, :data:`UNDERFLOW`. Evaluations that cut sequences into segments: see ``segments.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ...backend import Chunked
from .call import Call
from .gates import beta_of, log_decay, normalise
from .operands import CERTAIN, TYPICAL, UNIT, OperandRounding
from .segments import U32, Segments

__all__ = ["Reference", "reference"]

#: Below 2**-126 float32 has no relative accuracy, and a GPU may flush to zero; a sum of K terms, or a gate times a
#: value, carries up to about 256 such errors.
UNDERFLOW = 2.0**-118
F64 = torch.float64


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

    def lasting(self) -> tuple[torch.Tensor, ...]:
        """All its tensors: nothing may change them."""
        exact = (self.o, self.o_bound, self.state, self.state_bound, self.steps, self.steps_bound)
        all_of_them = (*exact, self.o_noise, self.state_noise)
        return tuple(t for t in all_of_them if t is not None)

    def places(self) -> tuple[int, ...]:
        """What it describes."""
        return (*self.heads, *self.offsets)


@dataclass(frozen=True, slots=True)
class _Gates:
    """Per-token quantities for the chosen heads, float64: decay and its error, beta and its error, q, k, v."""

    decay: torch.Tensor  # [tokens, heads, K or 1]
    decay_error: torch.Tensor  # same, in units of u, relative
    beta: torch.Tensor  # [tokens, heads, 1]
    beta_error: torch.Tensor
    q: torch.Tensor  # [tokens, heads, K], normalised and scaled
    k: torch.Tensor
    v: torch.Tensor  # [tokens, heads, V]
    norm_error: float


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
    rounded, cut = (chunk.rounded, chunk.cut) if isinstance(chunk, Chunked) else (False, 0)
    chunk = chunk.tokens if isinstance(chunk, Chunked) else chunk
    device = torch.device(device)
    chosen = tuple(range(call.hv)) if heads is None else tuple(heads)
    index = torch.tensor(chosen, dtype=torch.int64, device=device)
    gates = _gates(call, index, chunk)
    offsets = call.offsets if call.lengths_on_host else tuple(_on(call.cu_seqlens, "cpu").tolist())
    n = len(offsets) - 1
    lengths = [y - x for x, y in pairwise(offsets)]
    order = sorted(range(n), key=lambda i: -lengths[i])
    k_dim, v_dim = call.key_dim, call.value_dim

    start = _start_states(call, index, n) if initial is None else initial.to(device, F64)
    h = start[order].clone() if n else start.clone()
    error = torch.zeros(n, len(chosen), v_dim, dtype=F64, device=device)
    o = torch.full((call.tokens, len(chosen), v_dim), math.nan, dtype=F64, device=device)
    o_bound = torch.zeros_like(o)
    keep = call.intermediates is not None
    shape = (call.tokens, len(chosen), k_dim, v_dim)
    steps = torch.full(shape, math.nan, dtype=F64, device=device) if keep else None
    steps_bound = torch.zeros(call.tokens, len(chosen), v_dim, dtype=F64, device=device) if keep else None
    tree = _Tree.of(call, order, h) if call.parents is not None else None
    major = h.abs() if chunk else None
    spread = torch.zeros_like(h) if chunk else None
    starts = torch.tensor([offsets[i] for i in order], dtype=torch.int64, device=device)
    ends = torch.tensor([offsets[i + 1] for i in order], dtype=torch.int64, device=device)
    operands = OperandRounding(call.tokens, h) if rounded else None
    segments = Segments(cut, h, call.tokens, rounded) if chunk and cut else None
    wide = replace(gates, v=Segments.values(gates.v, k_dim)) if segments is not None else None

    for t in range(max(lengths, default=0)):
        live = sum(1 for i in order if lengths[i] > t)  # order is by length: a prefix is alive
        rows = starts[:live] + t
        if tree is not None and t:
            tree.load(t, live, h, error, steps, steps_bound, [offsets[i] + t for i in order[:live]])
        if segments is not None and t % cut == 0:
            segments.begin(live, h, error, operands)
        if chunk and t % chunk == 0 and major is not None and spread is not None:
            major[:live] = h[:live].abs()
            spread[:live] = 0
            tokens = rows[:, None] + torch.arange(chunk, device=device)
            there = tokens < ends[:live, None]
            tokens = torch.where(there, tokens, rows[:, None])
            if operands is not None:
                operands.add(tokens, there, h[:live], gates.q, gates.k, gates.v, gates.decay, gates.beta)
            if segments is not None and wide is not None:
                segments.begin_chunk(live, tokens, there, wide.q, wide.k, wide.v, wide.decay, wide.beta)
        _step(call, gates, rows, h, error, o, o_bound, live, major, spread, chunk)
        if segments is not None and wide is not None and chunk:
            _advance(call, wide, rows, segments.h, segments.error, live, segments.major, segments.spread, chunk)
        if chunk and major is not None and spread is not None:
            full = (t + 1) % chunk == 0
            formed = [i for i in range(live) if full or lengths[order[i]] == t + 1]
            if formed:
                _form_state(gates, error, major, spread, formed, chunk)
                if segments is not None:
                    _form_state(gates, segments.error, segments.major, segments.spread, formed, chunk)
            if segments is not None and (t + 1) % cut == 0:
                segments.join(sum(1 for i in order if lengths[i] > t + 1), h, error, operands)
        if steps is not None and steps_bound is not None:
            steps[rows] = h[:live]
            steps_bound[rows] = error[:live]

    back = torch.tensor(order, dtype=torch.int64, device=device).argsort()
    for bound in (o_bound, steps_bound):
        if bound is not None:
            bound[: offsets[-1]] += UNDERFLOW
    # An empty sequence keeps its bits.
    run = torch.tensor([length > 0 for length in lengths], dtype=torch.bool, device=device)
    state_bound = error[back]
    o_noise = state_noise = None
    if operands is not None:
        o_bound = o_bound + CERTAIN * UNIT * operands.o.sqrt()
        state_bound = state_bound + CERTAIN * UNIT * operands.column[back].sqrt()
        o_noise, state_noise = (TYPICAL * UNIT * x.sqrt() for x in (operands.o_typical, operands.state[back]))
    state_bound[run] += UNDERFLOW
    return Reference(chosen, offsets, o, o_bound, h[back], state_bound, steps, steps_bound, o_noise, state_noise)


def _on(tensor: torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    assert tensor is not None
    return tensor.detach().to(device)


def _start_states(call: Call, index: torch.Tensor, n: int) -> torch.Tensor:
    start = torch.zeros(n, len(index), call.key_dim, call.value_dim, dtype=F64, device=index.device)
    if call.pool is None or call.read_slots is None:
        return start
    for i, slot in enumerate(call.read_slots.tolist()):
        if slot >= 0:
            state = _on(call.pool[slot], index.device)[index].to(F64)
            start[i] = state if call.state_layout == "kv" else state.transpose(-1, -2)
    return start


def _flat(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``[B, T, ...]`` to ``[tokens, ...]``, float64."""
    return _on(tensor, device).to(F64).flatten(0, 1)


def _gates(call: Call, index: torch.Tensor, chunk: int | None) -> _Gates:
    group, device = index // (call.hv // call.h), index.device
    q, k, v = _flat(call.q, device)[:, group], _flat(call.k, device)[:, group], _flat(call.v, device)[:, index]
    a, b = _flat(call.a, device)[:, index], _flat(call.b, device)[:, index]
    A_log, bias = _on(call.A_log, device).to(F64)[index], _on(call.dt_bias, device).to(F64)[index]
    if call.is_kda:
        A_log = A_log[:, None]
    else:
        a, bias, A_log = a[..., None], bias[..., None], A_log[..., None]
    x = a + bias
    g = log_decay(A_log, x, call.softplus_beta, call.softplus_threshold, call.lower_bound)
    beta = beta_of(b, call.allow_neg_eigval)[..., None]
    norm_error = 0.0
    if call.use_qk_l2norm:
        q, k = normalise(q), normalise(k)
        norm_error = 3 * math.sqrt(call.key_dim) + 5
    return _Gates(
        decay=torch.exp(g),
        decay_error=_decay_error(call, A_log, a, bias, x, g, chunk),
        beta=beta,
        beta_error=4 + b[..., None].abs() * (1 - torch.sigmoid(b))[..., None],
        q=q * call.scale,
        k=k,
        v=v,
        norm_error=norm_error,
    )


def _decay_error(
    call: Call,
    A_log: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor,
    chunk: int | None,
) -> torch.Tensor:
    """Relative error of exp(g) in units of u: that of g (absolute), plus exp's own."""
    sum_error = a.abs() + bias.abs() + x.abs()  # rounding of a + dt_bias and of its product with beta
    scale = torch.exp(A_log)
    if call.lower_bound is not None:
        y = scale * x
        slope = abs(call.lower_bound) * torch.sigmoid(y) * torch.sigmoid(-y)
        g_error = slope * (y.abs() * (4 + A_log.abs()) + scale * sum_error) + 4 * g.abs()
        g_error = torch.where(slope == 0, 4 * g.abs(), g_error)
    else:
        g_error = g.abs() * (2 * (3 + A_log.abs()) + 1)
        g_error = g_error + scale * torch.sigmoid(call.softplus_beta * x) * sum_error
    if chunk:
        g_error = g_error + 6 * math.sqrt(chunk) * g.abs()  # decays between tokens are sums of g over the chunk
    return g_error + g.abs() + 2


def _step(
    call: Call,
    gates: _Gates,
    rows: torch.Tensor,
    h: torch.Tensor,
    error: torch.Tensor,
    o: torch.Tensor,
    o_bound: torch.Tensor,
    live: int,
    major: torch.Tensor | None,
    spread: torch.Tensor | None,
    chunk: int | None,
) -> None:
    """One token of every live sequence, in place on h, error, o, o_bound (and the chunk's majorants)."""
    _advance(call, gates, rows, h, error, live, major, spread, chunk)
    q = gates.q[rows]
    m, c_n = 6 * math.sqrt(call.key_dim), gates.norm_error
    o[rows] = torch.einsum("nhkv,nhk->nhv", h[:live], q)
    if major is None or spread is None or not chunk:
        parts = (m + c_n + 2) * h[:live].abs()
    else:
        parts = spread[:live] + (m + 6 * math.sqrt(chunk) + 4 * c_n + 4) * major[:live]
    shown = torch.einsum("nhkv,nhk->nhv", parts, q.abs())
    o_bound[rows] = q.norm(dim=-1, keepdim=True) * error[:live] + U32 * shown


def _advance(
    call: Call,
    gates: _Gates,
    rows: torch.Tensor,
    h: torch.Tensor,
    error: torch.Tensor,
    live: int,
    major: torch.Tensor | None,
    spread: torch.Tensor | None,
    chunk: int | None,
) -> None:
    """The states of :func:`_step`, and their errors."""
    decay, c_g = gates.decay[rows], gates.decay_error[rows]
    beta, c_beta = gates.beta[rows], gates.beta_error[rows]
    k, v = gates.k[rows], gates.v[rows]
    m, c_n = 6 * math.sqrt(call.key_dim), gates.norm_error
    k_norm, k_abs = k.norm(dim=-1, keepdim=True), k.abs()

    state = h[:live] * decay[..., None]
    d = torch.einsum("nhkv,nhk->nhv", state, k)
    u = beta * (v - d)
    new = state + k[..., None] * u[..., None, :]
    h[:live] = new

    growth = decay.amax(-1, keepdim=True)
    if not call.use_qk_l2norm:
        growth = growth * torch.maximum(torch.ones_like(beta), (1 - beta * k_norm**2).abs())
    value_error = beta * k_norm * (c_beta + 4 + 2 * c_n) * (v.abs() + d.abs())
    if major is None or spread is None or not chunk:
        magnitude = torch.einsum("nhkv,nhk->nhv", state.abs(), k_abs)
        local = ((c_g[..., None] + 1) * state).norm(dim=-2) + beta * k_norm * (m + 2 * c_n + 2) * magnitude
        error[:live] = growth * error[:live] + U32 * (local + value_error + 2 * new.norm(dim=-2))
    else:
        m_all = m + 6 * math.sqrt(chunk)
        weight = (c_g * decay)[..., None]
        spread[:live] = decay[..., None] * spread[:live] + weight * major[:live]
        parts = decay[..., None] * major[:live]
        magnitude = torch.einsum("nhkv,nhk->nhv", spread[:live] + (m_all + 4 * c_n + 4) * parts, k_abs)
        error[:live] = growth * error[:live] + U32 * (beta * k_norm * magnitude + value_error)
        major[:live] = parts + k_abs[..., None] * u.abs()[..., None, :]


def _form_state(
    gates: _Gates,
    error: torch.Tensor,
    major: torch.Tensor,
    spread: torch.Tensor,
    which: list[int],
    chunk: int,
) -> None:
    """At the end of a chunk, or of a sequence inside one, the state is formed: its rounding joins the error."""
    weight = 6 * math.sqrt(chunk) + 2 * gates.norm_error + 4
    error[which] += U32 * (spread[which] + weight * major[which]).norm(dim=-2)


class _Tree:
    """Token-tree verification: step t starts from the stored state of its parent."""

    def __init__(self, parents: list[list[int]], chained: list[bool], start: torch.Tensor, rounding: float) -> None:
        self.parents = parents
        self.chained = chained
        self.start = start
        self.rounding = rounding

    @classmethod
    def of(cls, call: Call, order: list[int], start: torch.Tensor) -> _Tree:
        from .dtypes import dtype_name, unit_roundoff

        assert call.intermediates is not None
        assert call.parents is not None
        assert call.intermediate_rows is not None
        table = call.parents.tolist()
        rows = call.intermediate_rows.tolist()
        name = dtype_name(call.intermediates.dtype)
        rounding = 0.0 if name in ("float32", "float64") else unit_roundoff(name)
        return cls([table[i] for i in order], [rows[i] < 0 for i in order], start.clone(), rounding)

    def load(
        self,
        t: int,
        live: int,
        h: torch.Tensor,
        error: torch.Tensor,
        steps: torch.Tensor | None,
        steps_bound: torch.Tensor | None,
        rows: list[int],
    ) -> None:
        """Put each live sequence's parent state, as the buffer's dtype holds it, into h."""
        assert steps is not None
        assert steps_bound is not None
        for i in range(live):
            parent = self.parents[i][t]
            if self.chained[i]:
                continue  # nothing is stored for this sequence, so its steps follow one another
            if parent < 0:
                h[i], error[i] = self.start[i], 0
                continue
            row = rows[i] - t + parent
            h[i], error[i] = steps[row], steps_bound[row]
            if self.rounding:
                # An evaluation's state may round to the neighbouring value: one whole ulp apart, per element.
                exact = h[i]
                dtype = torch.bfloat16 if self.rounding > 2.0**-10 else torch.float16
                h[i] = exact.to(dtype).to(F64)
                error[i] = error[i] + 2 * self.rounding * exact.norm(dim=-2)
