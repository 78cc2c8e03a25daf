"""The call of one run: views of the whole call's tensors, nothing copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry.ops.fused_sigmoid_gating.call import Call

if TYPE_CHECKING:
    import torch

    from ...registry.varlen.runs import Run

__all__ = ["PER_SEQUENCE", "PER_TOKEN", "call_of"]

#: Tensors of a call that have a row per token (their second axis), and those with an entry per sequence (their first).
PER_TOKEN = frozenset("a q k v b out".split())
PER_SEQUENCE = frozenset("read_slots write_slots intermediate_rows parents".split())


def call_of(call: Call, run: Run) -> Call:
    """``call`` on the sequences of ``run`` alone.

    Token tensors lose the rows of other runs, slots, rows and parents the entries of other sequences; the pool and the
    buffer of intermediate states stay whole, since slots and rows number all of them.

    Args:
        call: packed, with its output.
    """
    span, layout = run.span, run.layout
    start, rows, first, count = span.start, span.stop - span.start, span.first, span.last - span.first

    def tokens(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(1, start, rows)

    def sequences(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.narrow(0, first, count)

    assert call.out is not None
    read = sequences(call.read_slots)
    # "In place" is said by the two being one tensor.
    write = read if call.write_slots is call.read_slots else sequences(call.write_slots)
    return Call(
        call.A_log, tokens(call.a), call.dt_bias, call.softplus_beta, call.softplus_threshold, tokens(call.q),
        tokens(call.k), tokens(call.v), tokens(call.b), call.scale, call.use_qk_l2norm, call.pool, read, write,
        call.state_layout, layout.cu_seqlens, layout, layout.longest, call.is_kda, call.lower_bound,
        call.allow_neg_eigval, call.intermediates, sequences(call.intermediate_rows), sequences(call.parents),
        tokens(call.out),
    )  # fmt: skip
