"""A correct float32 evaluation of the op, cut into seams: the places where a planted fault can be put.

Every method is one decision of a kernel author. A planted fault overrides one of them and is otherwise correct,
so that a check which finds it has found that fault.

Equal inputs give equal bits however they are packed, strided or split, which torch's own sums and functions do not
promise: sums are folded in a fixed order, and gates are computed in float64, where the last bit does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .call import Call

__all__ = ["Rows", "Seams", "folded"]

Tensor = torch.Tensor


@dataclass(eq=False, slots=True)
class Rows:
    """Everything a step needs, for all tokens at once, float32 (T tokens of the whole batch).

    Attributes:
        q, k: ``[T, HV, K]``, normalised and scaled; v: ``[T, HV, V]``;
        decay: ``[T, HV, K]`` or ``[T, HV, 1]``; beta: ``[T, HV, 1]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor


def folded(x: Tensor, axis: int) -> Tensor:
    """Sum over ``axis``, the upper half added to the lower until one is left: the same order for every element."""
    while (size := x.shape[axis]) > 1:
        half = (size + 1) // 2
        lower, upper = x.narrow(axis, 0, half), x.narrow(axis, half, size - half)
        x = lower.clone()
        x.narrow(axis, 0, size - half).add_(upper)
    return x.squeeze(axis)


class Seams:
    """Token by token, all value heads at once. Instances are runners: they take a Call and fill ``call.out``."""

    def __call__(self, call: Call) -> Tensor:
        out = self.output(call)
        rows = self.rows(call)
        for n in range(call.n):
            first, last = self.span(call, n)
            if first < last:
                self.sequence(call, rows, n, first, last, out)
            else:
                self.empty(call, n)
        self.finish(call, out)
        return out

    def sequence(self, call: Call, rows: Rows, n: int, first: int, last: int, out: Tensor) -> None:
        start = state = self.load(call, n)
        for t in range(last - first):
            state = self.origin(call, n, t, state, start)
            state, o = self.step(rows, first + t, t, state)
            self.emit(call, out, first + t, o)
            self.keep(call, n, t, state)
        self.store(call, n, state)

    # -- where a sequence lies, and where its results go

    def output(self, call: Call) -> Tensor:
        if call.out is not None:
            return call.out
        return torch.zeros(*call.v.shape, dtype=call.q.dtype, device=call.q.device)

    def span(self, call: Call, n: int) -> tuple[int, int]:
        """First row and the row after the last."""
        return call.offsets[n], call.offsets[n + 1]

    def empty(self, call: Call, n: int) -> None:
        """A sequence without tokens: nothing happens."""

    def emit(self, call: Call, out: Tensor, row: int, o: Tensor) -> None:
        """Write the output ``o [HV, V]`` of a token row."""
        length = call.q.shape[1]
        out[row // length, row % length] = self.rounded(o, out.dtype)

    def rounded(self, o: Tensor, dtype: torch.dtype) -> Tensor:
        return o.to(dtype)

    def finish(self, call: Call, out: Tensor) -> None:
        """After the last sequence: nothing is left to do."""

    # -- states

    def read_slot(self, call: Call, n: int) -> int:
        return -1 if call.read_slots is None else int(call.read_slots[n])

    def write_slot(self, call: Call, n: int) -> int:
        return -1 if call.write_slots is None else int(call.write_slots[n])

    def row_of(self, call: Call, n: int) -> int:
        return -1 if call.intermediate_rows is None else int(call.intermediate_rows[n])

    def oriented(self, stored: Tensor, call: Call) -> Tensor:
        """A view ``[HV, K, V]`` of a stored state."""
        return stored if call.state_layout == "kv" else stored.transpose(-1, -2)

    def zeros(self, call: Call) -> Tensor:
        return torch.zeros(call.hv, call.key_dim, call.value_dim, device=call.q.device)

    def load(self, call: Call, n: int) -> Tensor:
        """The state ``[HV, K, V]`` sequence n starts from."""
        slot = self.read_slot(call, n)
        if call.pool is None or slot < 0:
            return self.zeros(call)
        return self.oriented(call.pool[slot], call).to(torch.float32, copy=True)

    def store(self, call: Call, n: int, state: Tensor) -> None:
        slot = self.write_slot(call, n)
        if call.pool is not None and slot >= 0:
            self.oriented(call.pool[slot], call).copy_(self.rounded_state(state, call.pool.dtype))

    def rounded_state(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return state.to(dtype)

    def keep(self, call: Call, n: int, t: int, state: Tensor) -> None:
        """Store the state after step t, if the call asks for it."""
        row = self.row_of(call, n)
        if call.intermediates is not None and row >= 0:
            self.oriented(call.intermediates[row, t], call).copy_(state)

    def origin(self, call: Call, n: int, t: int, state: Tensor, start: Tensor) -> Tensor:
        """The state step t starts from: the one before, or in a tree its parent's."""
        row = self.row_of(call, n)
        if call.parents is None or call.intermediates is None or t == 0 or row < 0:
            return state
        parent = int(call.parents[n, t])
        if parent < 0:
            return start
        return self.oriented(call.intermediates[row, parent], call).to(torch.float32, copy=True)

    # -- gates, keys and queries

    def rows(self, call: Call) -> Rows:
        q, k, v = (t.flatten(0, 1).float() for t in (call.q, call.k, call.v))
        a, b = (t.flatten(0, 1).double() for t in (call.a, call.b))
        heads = self.head_map(call)
        decay = self.decay(self.log_decay(self.gate_input(a, call.dt_bias.double()), call))
        return Rows(
            q=self.query(q, call)[:, heads],
            k=self.key(k, call)[:, heads],
            v=v,
            decay=(decay if call.is_kda else decay[..., None]).float(),
            beta=self.beta(b, call)[..., None].float(),
        )

    def head_map(self, call: Call) -> Tensor:
        """The q/k head of each value head."""
        return torch.arange(call.hv, device=call.q.device) // (call.hv // call.h)

    def normalised(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(folded(x * x, -1)[..., None] + 1e-6)

    def query(self, q: Tensor, call: Call) -> Tensor:
        return (self.normalised(q) if call.use_qk_l2norm else q) * call.scale

    def key(self, k: Tensor, call: Call) -> Tensor:
        return self.normalised(k) if call.use_qk_l2norm else k

    def gate_input(self, a: Tensor, dt_bias: Tensor) -> Tensor:
        return a + dt_bias

    def rate(self, call: Call) -> Tensor:
        """``exp(A_log)`` in the shape that broadcasts against the gate: ``[HV]``, for KDA ``[HV, 1]``; float64."""
        rate = call.A_log.double().exp()
        return rate[:, None] if call.is_kda else rate

    def log_decay(self, x: Tensor, call: Call) -> Tensor:
        """``g`` from ``x = a + dt_bias``, both ``[T, HV]`` or ``[T, HV, K]``, float64."""
        if call.lower_bound is not None:
            return call.lower_bound * torch.sigmoid(self.rate(call) * x)
        softplus = self.softplus(call.softplus_beta * x, call.softplus_threshold) / call.softplus_beta
        return -self.rate(call) * softplus

    def softplus(self, z: Tensor, threshold: float) -> Tensor:
        return torch.where(z > threshold, z, z.clamp(min=0) + torch.log1p(torch.exp(-z.abs())))

    def decay(self, g: Tensor) -> Tensor:
        return g.exp()

    def beta(self, b: Tensor, call: Call) -> Tensor:
        return b.sigmoid() * (2 if call.allow_neg_eigval else 1)

    # -- one token

    def step(self, rows: Rows, row: int, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """State ``[HV, K, V]`` before token t of a sequence (row ``row`` of the batch) to state and output after."""
        state = state * rows.decay[row][..., None]
        u = rows.beta[row] * (rows.v[row] - self.product(state, rows.k[row]))
        state = self.carried(state + rows.k[row][..., None] * u[:, None, :])
        return state, self.product(state, rows.q[row])

    def product(self, state: Tensor, x: Tensor) -> Tensor:
        """``S^T x``: ``[HV, V]``."""
        return folded(state * x[..., None], 1)

    def carried(self, state: Tensor) -> Tensor:
        """The state as the next token finds it."""
        return state
