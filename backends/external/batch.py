"""A call as libraries want it: packed along one batch row, and where they need it without empty sequences."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from .around import copy_rows

__all__ = ["NOTHING", "Batch", "Spans", "SpansOf", "deliver", "order_of", "refuse_in_capture"]

#: Batches whose offsets a bound adapter keeps; serving comes back to few.
_KEPT = 64
#: Gate inputs of a token that changes nothing: exp and sigmoid of it are 0.
NOTHING = -1e4


def refuse_in_capture(device: torch.device, what: str) -> None:
    """Raise RuntimeError where a tensor that outlives the call would come from a CUDA graph's own memory."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"call {what} before capturing it in a CUDA graph")


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """The non-empty sequences of a batch whose lengths the host knows.

    Attributes:
        lengths: of the non-empty ones. live: their numbers ``[n]``, None if no sequence is empty.
        cu: ``[n + 1]`` int32 offsets; cu64: the same in int64; cu_cpu: the same on the host.
        order: ``[n]`` int32 numbers 0, 1, ...
    """

    lengths: tuple[int, ...]
    live: torch.Tensor | None
    cu: torch.Tensor
    cu64: torch.Tensor
    cu_cpu: torch.Tensor
    order: torch.Tensor
    _padding: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, offsets: tuple[int, ...], device: torch.device) -> Spans:
        """From the host's offsets ``N + 1``."""
        every = [y - x for x, y in pairwise(offsets)]
        live = [i for i, length in enumerate(every) if length]
        cu_cpu = torch.tensor([offsets[0], *(offsets[i + 1] for i in live)], dtype=torch.int64)
        return cls(
            lengths=tuple(every[i] for i in live),
            live=None if len(live) == len(every) else torch.tensor(live, dtype=torch.int64, device=device),
            cu=cu_cpu.to(device, torch.int32),
            cu64=cu_cpu.to(device, copy=True),
            cu_cpu=cu_cpu,
            order=torch.arange(len(live), dtype=torch.int32, device=device),
        )

    @property
    def n(self) -> int:
        """Non-empty sequences."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def equal(self) -> bool:
        """Whether all lengths are equal."""
        return len(set(self.lengths)) <= 1

    def padding(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For sequences padded to the longest: the row of each place ``[n * longest]`` (row 0 where there is none),
        whether there is one ``[n * longest]``, and the place of each row ``[tokens]``.
        """
        if not self._padding:
            step, length = torch.arange(self.longest), torch.tensor(self.lengths)
            inside = step < length[:, None]
            rows = torch.where(inside, self.cu_cpu[:-1, None] + step, torch.zeros_like(step)).flatten()
            inside = inside.flatten()
            device = self.cu.device
            self._padding.append((rows.to(device), inside.to(device), inside.nonzero()[:, 0].to(device)))
        return self._padding[0]


class SpansOf:
    """The spans of calls, made once per offsets, so that a library sees the same tensors every time."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[tuple[int, ...], torch.device], Spans] = OrderedDict()

    def __call__(self, call: Call) -> Spans:
        """Of a call whose lengths the host knows.

        Raises RuntimeError inside a CUDA graph capture if they are new: they would have to be copied to the device.
        """
        key = (call.offsets, call.q.device)
        found = self._kept.get(key)
        if found is None:
            refuse_in_capture(call.q.device, "once with these lengths")
            found = self._kept[key] = Spans.of(*key)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return found


#: q, k, v, a, b.
_Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A call's tensors packed: q, k ``[1, T, H, K]``, v ``[1, T, HV, V]``, a, b ``[1, T, HV(, K)]``.

    Attributes:
        n: sequences; read, write: slots ``[n]``, None as in the call.
        cu: ``[n + 1]`` offsets on the device.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    n: int
    cu: torch.Tensor
    read: torch.Tensor | None
    write: torch.Tensor | None

    @classmethod
    def whole(cls, call: Call, spans_of: SpansOf) -> Batch:
        """All sequences and rows of the call, empty ones among them; lengths are not needed on the host."""
        cu = call.cu_seqlens
        if cu is None:
            cu = _all_offsets(call, spans_of)
        return cls(*_packed(call, call.tokens), call.n, cu, _index(call.read_slots), _index(call.write_slots))

    @classmethod
    def spanned(cls, call: Call, spans: Spans) -> Batch:
        """The non-empty sequences and the rows they cover."""
        read, write = _index(call.read_slots, spans.live), _index(call.write_slots, spans.live)
        return cls(*_packed(call, spans.tokens), spans.n, spans.cu, read, write)


def order_of(batch: Batch, kept: dict[tuple[int, torch.device], torch.Tensor]) -> torch.Tensor:
    """``[n]`` int32 numbers 0, 1, ... beside the batch; made once, in ``kept``."""
    key = (batch.n, batch.q.device)
    if key not in kept:
        refuse_in_capture(key[1], f"once with {batch.n} sequences")
        kept[key] = torch.arange(batch.n, dtype=torch.int32, device=key[1])
    return kept[key]


def _all_offsets(call: Call, spans_of: SpansOf) -> torch.Tensor:
    """Offsets of a batch of equal lengths; none is empty, for there are tokens."""
    return spans_of(call).cu


def _packed(call: Call, rows: int) -> _Tokens:
    return (
        _flat(call.q, rows),
        _flat(call.k, rows),
        _flat(call.v, rows),
        _flat(call.a, rows),
        _flat(call.b, rows),
    )


def _flat(t: torch.Tensor, rows: int) -> torch.Tensor:
    # A view wherever the batch rows lie at equal distances; else the packed copy that a library would make, too.
    flat = t if t.shape[0] == 1 else t.reshape(1, -1, *t.shape[2:])
    return flat if flat.shape[1] == rows else flat[:, :rows]


def _index(slots: torch.Tensor | None, live: torch.Tensor | None = None) -> torch.Tensor | None:
    if slots is None:
        return None
    return slots.contiguous() if live is None else slots.index_select(0, live)


def deliver(call: Call, rows: torch.Tensor) -> torch.Tensor:
    """The call's output from ``rows [1, T, HV, V]``, of which those beyond the last offset are left out.

    Without ``call.out`` the library's own tensor is what comes back wherever it covers all rows.
    """
    out = call.out
    if out is None:
        if rows.shape[1] == call.tokens and rows.dtype is call.q.dtype:
            return rows.view(call.v.shape)
        out = torch.empty(call.v.shape, dtype=call.q.dtype, device=call.q.device)
    if call.cu_seqlens is None:
        return out.copy_(rows.view(out.shape))
    if call.lengths_on_host:
        covered = call.offsets[-1]
        out[0, :covered].copy_(rows[0, :covered])
    else:
        copy_rows(rows[0], out[0], call.cu_seqlens[-1:])
    return out
