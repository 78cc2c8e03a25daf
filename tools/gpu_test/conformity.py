"""Whether a launch on a cell's own tensors is right: judged on some sequences and heads, bits compared on all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...registry.backend import Chunked
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.judge import Judgement, judge
from ...registry.ops.fused_sigmoid_gating.reference import Reference, reference
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call

__all__ = ["Sample", "Truth"]

#: Sequences judged; 16 of them with two heads of 128 are as many outputs as the limit on equal bits needs.
_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """Some sequences of a call of equal lengths, and its first and last value head."""

    sequences: torch.Tensor
    rows: torch.Tensor
    heads: torch.Tensor
    key_heads: torch.Tensor

    @classmethod
    def of(cls, call: Call, length: int) -> Sample:
        """Spread over the batch, the first and the last sequence among them."""
        device = call.q.device
        count = min(call.n, _SEQUENCES)
        sequences = torch.linspace(0, call.n - 1, count, device=device).round().long()
        rows = (sequences[:, None] * length + torch.arange(length, device=device)).flatten()
        heads = torch.tensor([0, call.hv - 1], device=device)
        return cls(sequences, rows, heads, heads // (call.hv // call.h))

    def states(self, call: Call) -> torch.Tensor:
        """The sampled states of the pool, on the CPU."""
        assert call.pool is not None
        assert call.read_slots is not None
        slots = call.read_slots[self.sequences].long()
        return call.pool[slots][:, self.heads].cpu()

    def tokens(self, tensor: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """The sampled rows and heads of ``[1, T, heads, ...]``, on the CPU."""
        return tensor[:, self.rows][:, :, heads].cpu()

    def call(self, call: Call, length: int) -> Call:
        """A CPU call of the sample alone; every value head has a key head of its own."""
        count = len(self.sequences)
        return canonical_call(
            call.A_log[self.heads].cpu(),
            self.tokens(call.a, self.heads),
            call.dt_bias[self.heads].cpu(),
            call.softplus_beta,
            call.softplus_threshold,
            self.tokens(call.q, self.key_heads),
            self.tokens(call.k, self.key_heads),
            self.tokens(call.v, self.heads),
            self.tokens(call.b, self.heads),
            self.states(call),
            torch.arange(count, dtype=torch.int32),
            use_qk_l2norm_in_kernel=call.use_qk_l2norm,
            cu_seqlens=torch.arange(0, count * length + 1, length, dtype=torch.int32),
            state_layout=call.state_layout,
        )


class Truth:
    """Puts a call's states back, runs a launch on it and judges what it left.

    Configs of one backend mostly leave the same bits: those of a launch already judged need no judging again.
    """

    def __init__(self, call: Call, length: int) -> None:
        self._call = call
        self._sample = Sample.of(call, length)
        self._sampled = self._sample.call(call, length)
        self._references: dict[int | Chunked | None, Reference] = {}
        self._start = self._states().clone()
        self._judged: list[tuple[torch.Tensor, torch.Tensor, Judgement]] = []

    def _exact(self, chunk: int | Chunked | None) -> Reference:
        if chunk not in self._references:
            self._references[chunk] = reference(self._sampled, chunk=chunk)
        return self._references[chunk]

    def _states(self) -> torch.Tensor:
        """The states of the call's own slots, which are the pool's first ones."""
        assert self._call.pool is not None
        return self._call.pool[: self._call.n]

    def prepare(self) -> Call:
        """The call, its states as they were, its output full of NaN."""
        self._states().copy_(self._start)
        assert self._call.out is not None
        self._call.out.fill_(float("nan"))
        return self._call

    def forget(self) -> None:
        """Another backend comes: its bits may well be others."""
        self._judged.clear()

    def judge(self, out: torch.Tensor, chunk: int | Chunked | None = None) -> tuple[Judgement, bool]:
        """Of what a launch on ``prepare()`` left; and whether its bits are others than those of launches before.

        ``chunk``: what the error bound is made for.
        """
        if out.is_cuda:
            torch.cuda.synchronize()
        states = self._states()
        for known_out, known_states, judgement in self._judged:
            if _equal(out, known_out) and _equal(states, known_states):
                return judgement, False
        new = bool(self._judged)
        after = self._sampled.replace(pool=self._sample.states(self._call))
        judgement = judge(after, self._sample.tokens(out, self._sample.heads), self._exact(chunk))
        self._judged.append((out.clone(), states.clone(), judgement))
        return judgement, new


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    kind = torch.int16 if x.element_size() == 2 else torch.int32
    return torch.equal(x.view(kind), y.view(kind))
