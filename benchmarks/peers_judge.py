"""Whether an implementation does the cell's job: some sequences and heads against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from isokern.registry.backend import Chunked
from isokern.registry.ops.fused_sigmoid_gating.call import Call
from isokern.registry.ops.fused_sigmoid_gating.judge import Judgement, judge
from isokern.registry.ops.fused_sigmoid_gating.reference import Reference, reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

__all__ = ["SAME_JOB", "Truth"]

#: Relative 2-norm up to which an output is that of the same job; chunked kernels on bfloat16 operands are near 0.004.
SAME_JOB = 0.02
#: Sequences looked at, and tokens of all of them: a longer one is judged by its first tokens, which no later one
#: changes, and its state is not.
_SEQUENCES = 16
_TOKENS = 320


class Truth:
    """The reference of a sample of one call, made before anything runs on it."""

    def __init__(self, call: Call) -> None:
        assert call.pool is not None
        assert call.read_slots is not None
        self._call = call
        spans = list(pairwise(call.offsets))
        count = min(call.n, _SEQUENCES)
        chosen = sorted({round(i * (call.n - 1) / max(1, count - 1)) for i in range(count)})
        # The longest is what a kernel for short ones gets wrong.
        chosen = sorted({*chosen, max(range(call.n), key=lambda i: spans[i][1] - spans[i][0])})
        left, rows, lengths, whole = _TOKENS, [], [], []
        for place, i in enumerate(chosen):
            first, last = spans[i]
            taken = min(last - first, max(1, left // (len(chosen) - place)))
            left -= taken
            rows += range(first, first + taken)
            lengths.append(taken)
            whole.append(taken == last - first)
        device = call.q.device
        self._rows = torch.tensor(rows, device=device)
        self._heads = torch.tensor(sorted({0, call.hv - 1}), device=device)
        self._slots = call.read_slots[torch.tensor(chosen, device=device)].long()
        self._all_slots = call.read_slots.long()
        self._start = call.pool[self._all_slots].clone()
        self._chosen = torch.tensor(chosen, device=device)
        sample = self._sampled(call, lengths)
        if call.write_slots is not None:
            kept = torch.where(torch.tensor(whole), torch.arange(len(chosen)), -1)
            sample = sample.replace(write_slots=kept.to(torch.int32))
        self._sample = sample
        self._references: dict[int | Chunked | None, Reference] = {}

    def _take(self, tensor: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        return tensor[:, self._rows][:, :, heads].cpu()

    def _sampled(self, call: Call, lengths: list[int]) -> Call:
        """A CPU call of the sample alone; every value head has a key head of its own."""
        heads, keys = self._heads, self._heads // (call.hv // call.h)
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        slots = torch.arange(len(lengths), dtype=torch.int32)
        verify: dict[str, torch.Tensor | None] = {}
        if call.intermediates is not None:
            parents = None if call.parents is None else call.parents[self._chosen].cpu()
            verify = {
                "intermediate_states_buffer": self._steps(),
                "intermediate_state_indices": slots,
                "retrieve_parent_token": parents,
            }
        return canonical_call(
            call.A_log[heads].cpu(),
            self._take(call.a, heads),
            call.dt_bias[heads].cpu(),
            call.softplus_beta,
            call.softplus_threshold,
            self._take(call.q, keys),
            self._take(call.k, keys),
            self._take(call.v, heads),
            self._take(call.b, heads),
            self._states(),
            slots,
            scale=call.scale,
            use_qk_l2norm_in_kernel=call.use_qk_l2norm,
            cu_seqlens=offsets,
            state_layout=call.state_layout,
            output_state_indices=None if call.write_slots is None else slots,
            disable_state_update=call.write_slots is None,
            **verify,
        )

    def _states(self) -> torch.Tensor:
        assert self._call.pool is not None
        return self._call.pool[self._slots][:, self._heads].cpu()

    def _steps(self) -> torch.Tensor | None:
        """The sample's intermediate states ``[sequences, steps, heads, ...]``; None unless the call keeps them."""
        if self._call.intermediates is None:
            return None
        assert self._call.intermediate_rows is not None
        rows = self._call.intermediate_rows[self._chosen].long()
        return self._call.intermediates[rows][:, :, self._heads].cpu()

    def restore(self) -> None:
        """The call's states as they were; what it is to write after each token is NaN."""
        assert self._call.pool is not None
        self._call.pool[self._all_slots] = self._start
        if self._call.intermediates is not None:
            self._call.intermediates.fill_(float("nan"))

    def judge(self, out: torch.Tensor, chunk: int | Chunked | None = None) -> Judgement:
        """Of what a run on the restored call left, by the bound of chunked forms if ``chunk`` says so."""
        if chunk not in self._references:
            self._references[chunk] = reference(self._sample, chunk=chunk)
        if out.is_cuda:
            torch.cuda.synchronize()
        after = self._sample.replace(
            pool=self._states(), write_slots=self._sample.write_slots, intermediates=self._steps()
        )
        verdict = judge(after, self._take(out, self._heads), self._references[chunk])
        assert self._sample.pool is not None
        assert after.pool is not None
        if self._sample.write_slots is None and not torch.equal(after.pool, self._sample.pool):
            verdict = replace(verdict, faults=(*verdict.faults, "a state that was not to be updated has changed"))
        return verdict
