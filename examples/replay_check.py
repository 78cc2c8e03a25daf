"""Whether a replay computed the right thing: against float64, and every choice against the others.

Serving a request step by step must give what serving all its tokens in one call gives, within the op's error bound:
that is judged, by the judge of the conformance suite, for a sample of the requests. And whatever two choices compute
may differ by what two evaluations within the suite's limits can differ by: that is checked for every output and every
state. What is wrong is said in sentences; nobody's time counts before there are none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from replay_engine import OP, Batch, Choice, Stack

from isokern import registry
from isokern.registry.backend import Chunked, Config
from isokern.registry.conformance.subject import chunk_of
from isokern.registry.ops.fused_sigmoid_gating.dtypes import dtype_name
from isokern.registry.ops.fused_sigmoid_gating.judge import LIMITS, judge
from isokern.registry.ops.fused_sigmoid_gating.reference import Reference, reference

__all__ = ["Judge", "Witness", "differing_outputs", "differing_states"]

_TOKENS = ("a", "q", "k", "v", "b")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one piece of a request is: in which batch, from which of its rows on, how many, and in which slot."""

    batch: int
    row: int
    length: int
    slot: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one choice left of one request: outputs per layer and piece, and each layer's last state."""

    outputs: list[list[torch.Tensor]] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)


class Judge:
    """The sampled requests of a stack's batches, with their float64 results.

    Args:
        tokens: judged per layer, at most, unless the first request drawn has more. seed: of the sample.
    """

    def __init__(self, stack: Stack, tokens: int, seed: int = 0) -> None:
        self.stack = stack
        places: dict[int, list[_Place]] = {}
        begun_here = set()
        for index, batch in enumerate(stack.batches):
            row = 0
            for piece in batch.step.pieces:
                places.setdefault(piece.request, []).append(_Place(index, row, piece.length, piece.slot))
                if piece.start == 0:
                    begun_here.add(piece.request)
                row += piece.length
        order = sorted(places)
        random.Random(seed).shuffle(order)
        self.places: dict[int, list[_Place]] = {}
        left = tokens
        for request in order:
            needed = sum(place.length for place in places[request])
            if needed <= left or not self.places:
                self.places[request] = places[request]
                left -= needed
        self.begun_here = begun_here
        self._references: dict[tuple[int, int | Chunked | None], Reference] = {}

    def witness(self, choice: Choice) -> Witness:
        """What will watch ``choice``."""
        return Witness(self, choice)

    def kwargs(self, layer: int, states: Sequence[torch.Tensor] | None = None) -> dict[str, Any]:
        """One call of all sampled requests, each whole, in ``layer``; its pool holds ``states``, or those at the start.

        A pool of its own: slots of the stack's pools change hands.
        """
        batches, buffer = self.stack.batches, self.stack.buffers[layer]
        rows = [
            batches[place.batch].first + place.row + t
            for places in self.places.values()
            for place in places
            for t in range(place.length)
        ]
        index = torch.tensor(rows, device=self.stack.device)
        initial = self.stack.initial[layer]
        begin = [
            torch.zeros_like(initial[0]) if request in self.begun_here else initial[places[0].slot]
            for request, places in self.places.items()
        ]
        totals = accumulate((sum(place.length for place in places) for places in self.places.values()), initial=0)
        return {
            **buffer,
            **{name: buffer[name].index_select(1, index) for name in _TOKENS},
            "initial_state_source": torch.stack(list(begin if states is None else states)),
            "initial_state_indices": torch.arange(len(self.places), dtype=torch.int32, device=self.stack.device),
            "cu_seqlens": torch.tensor(list(totals), dtype=torch.int32, device=self.stack.device),
        }

    def reference(self, layer: int, chunk: int | Chunked | None) -> Reference:
        """The float64 results of :meth:`kwargs` for the first and the last value head; computed once."""
        if (layer, chunk) not in self._references:
            call = registry.spec(OP).canonical(**self.kwargs(layer))
            heads = sorted({0, call.hv - 1})
            self._references[layer, chunk] = reference(call, heads=heads, chunk=chunk)
        return self._references[layer, chunk]


class Witness:
    """Keeps what one choice computes for the sampled requests, then judges it.

    Attributes:
        chunk: of the error bound: the longest chunk of any config that ran; None while none works in chunks.
    """

    def __init__(self, judge: Judge, choice: Choice) -> None:
        self._judge = judge
        self._choice = choice
        self._seen = {request: _Seen() for request in judge.places}
        self._at: dict[int, list[tuple[int, _Place, bool]]] = {}
        for request, places in judge.places.items():
            for place in places:
                self._at.setdefault(place.batch, []).append((request, place, place is places[-1]))
        self.chunk: int | Chunked | None = None

    def ran(self, backend: str, config: dict[str, Any]) -> None:
        """Note who computes: its error bound depends on it."""
        chunk = chunk_of(registry.backends(OP)[backend], Config.from_dict(config))
        tokens = [c.tokens if isinstance(c, Chunked) else c or 0 for c in (chunk, self.chunk)]
        if tokens[0] > tokens[1]:
            self.chunk = chunk

    def see(self, index: int, outputs: Sequence[torch.Tensor], pools: Sequence[torch.Tensor]) -> None:
        """Keep what batch ``index`` left, before the next one runs."""
        for request, place, last in self._at.get(index, ()):
            seen = self._seen[request]
            rows = slice(place.row, place.row + place.length)
            seen.outputs.append([output[:, rows].clone() for output in outputs])
            if last:
                seen.states.extend(pool[place.slot].clone() for pool in pools)

    def faults(self) -> list[str]:
        """A sentence per layer and violated limit."""
        found = []
        for layer in range(len(self._judge.stack.buffers)):
            states = [seen.states[layer] for seen in self._seen.values()]
            call = registry.spec(OP).canonical(**self._judge.kwargs(layer, states))
            out = torch.cat([piece[layer] for seen in self._seen.values() for piece in seen.outputs], dim=1)
            verdict = judge(call, out, self._judge.reference(layer, self.chunk))
            found += [f"layer {layer}, against float64: {fault}" for fault in verdict.faults]
        return found


def _apart(got: torch.Tensor, other: torch.Tensor, limit: torch.Tensor | float) -> float:
    """The worst difference, in 2-norms over the last axis, over ``limit`` times the norm; infinite for NaN."""
    if not got.numel():
        return 0.0
    a, b = got.double(), other.double()
    allowed = limit * torch.maximum(a.norm(dim=-1), b.norm(dim=-1)) + 1e-30
    worst = float(((a - b).norm(dim=-1) / allowed).max())
    return worst if worst == worst else float("inf")  # noqa: PLR0124 - NaN equals nothing


def differing_outputs(batch: Batch, got: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> list[str]:
    """Where two choices' outputs ``[1, T, HV, V]`` differ by more than twice the suite's limit, per piece and head."""
    found = []
    for layer, (a, b) in enumerate(zip(got, other, strict=True)):
        limit = 2 * LIMITS[dtype_name(a.dtype)].rel_l2
        rows = batch.step.decode_rows
        parts = [(a[0, :rows], b[0, :rows])]  # decode rows: each its own piece
        start = rows
        for length in batch.step.lengths[rows:]:
            piece = slice(start, start + length)
            parts.append(tuple(t[0, piece].transpose(0, 1).flatten(1) for t in (a, b)))  # type: ignore[arg-type]
            start += length
        worst = max(_apart(x, y, limit) for x, y in parts)
        if not worst <= 1:
            found.append(f"layer {layer}: an output is {worst:.3g} times the limit from the first choice's")
    return found


def differing_states(stack: Stack, got: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> list[str]:
    """Where two choices' pools differ, per slot and head, by more than the calls that wrote the slot allow.

    A step of the recurrence amplifies no earlier error, so errors add up at most: twice the suite's limit per call.
    Slots that no call named must be equal bit for bit.
    """
    calls = [0] * got[0].shape[0]
    for batch in stack.batches:
        for piece in batch.step.pieces:
            calls[piece.slot] = 1 if piece.start == 0 else calls[piece.slot] + 1
    named = [slot for slot, count in enumerate(calls) if count]
    unnamed = [slot for slot, count in enumerate(calls) if not count]
    found = []
    for layer, (a, b) in enumerate(zip(got, other, strict=True)):
        if not torch.equal(a[unnamed], b[unnamed]):
            found.append(f"layer {layer}: a slot that nothing was served in has changed")
        count = torch.tensor([calls[slot] for slot in named], device=a.device)[:, None]
        limit = 2 * LIMITS[dtype_name(a.dtype)].rel_l2 * count
        worst = _apart(a[named].flatten(2), b[named].flatten(2), limit)
        if not worst <= 1:
            found.append(f"layer {layer}: a state is {worst:.3g} times the limit from the first choice's")
    return found
