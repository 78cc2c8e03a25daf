"""Trial: one call with its surroundings under watch: guards around the output, every storage remembered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ....conformance.check import Violation
from ....conformance.subject import Subject
from ....decision import RejectCode
from ....varlen.layout import SequenceLayout
from ..call import Call
from ..case import CaseSpec
from ..validate import canonical_call
from .kwargs import Kwargs, fresh

__all__ = ["GUARD_ELEMENTS", "Results", "Trial", "bits", "guarded", "storages"]

#: Elements in front of and behind the output that nothing may write.
GUARD_ELEMENTS = 512
_GUARD = 7.0


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """What a run left behind, as copies.

    Attributes:
        o: ``[tokens, HV, V]``: the covered rows.
        states: per sequence ``[HV, K, V]``, None where nothing may be stored.
        steps: per sequence ``[length, HV, K, V]``, None where no step is stored.
    """

    o: torch.Tensor
    states: tuple[torch.Tensor | None, ...]
    steps: tuple[torch.Tensor | None, ...]


class Trial:
    """One call, ready to run.

    Attributes:
        call: canonical arguments; ``call.out`` lies between guards.
        offsets: ``N + 1`` offsets of the sequences.
        before: the bytes of every storage behind the call as they were given, by address.
    """

    def __init__(self, kwargs: Kwargs) -> None:
        self.call = canonical_call(**kwargs)
        self.offsets = _offsets(self.call)
        if self.call.out is None:
            self.call.out = guarded(self.call.v.shape, self.call.q.dtype, self.call.q.device)
        self.poison = math.nan
        self.before = {key: data.clone() for key, data in storages(self.call).items()}

    @classmethod
    def of(cls, spec: CaseSpec, seed: int | None = None, device: torch.device | str = "cpu") -> Trial:
        """A fresh trial of a case."""
        return cls(fresh(spec, seed, device))

    @property
    def out(self) -> torch.Tensor:
        assert self.call.out is not None
        return self.call.out

    def run(self, subject: Subject, poison: float = math.nan) -> Results:
        """Run the backend on the call. Raises as ``Subject.run``."""
        self.poison = poison
        self.lend_lengths(subject)
        subject.run(self.call, poison)
        return self.results()

    def lend_lengths(self, subject: Subject) -> None:
        """A backend that needs the lengths on the host gets them as its users must give them, in a SequenceLayout."""
        call = self.call
        if call.lengths_on_host or subject.verdict(call.problem()):
            return
        assert call.cu_seqlens is not None
        with_lengths = call.replace(layout=SequenceLayout.from_cu_seqlens(call.cu_seqlens))
        if subject.verdict(with_lengths.problem()):
            self.call = with_lengths

    def results(self) -> Results:
        call = self.call
        rows = self.out.detach().flatten(0, 1)[: self.offsets[-1]].clone()
        states: list[torch.Tensor | None] = [None] * call.n
        if call.pool is not None and call.write_slots is not None:
            for n, slot in enumerate(call.write_slots.tolist()):
                if slot >= 0:
                    states[n] = self._kv(call.pool[slot]).clone()
        steps: list[torch.Tensor | None] = [None] * call.n
        if call.intermediates is not None and call.intermediate_rows is not None:
            lengths = [y - x for x, y in pairwise(self.offsets)]
            for n, row in enumerate(call.intermediate_rows.tolist()):
                if row >= 0:
                    steps[n] = self._kv(call.intermediates[row, : lengths[n]]).clone()
        return Results(rows, tuple(states), tuple(steps))

    def _kv(self, state: torch.Tensor) -> torch.Tensor:
        return state if self.call.state_layout == "kv" else state.transpose(-1, -2)

    def check_untouched(self) -> None:
        """Raise Violation if anything but the named states, steps and output rows has changed by a bit."""
        self.check_output()
        call = self.call
        written = _written(call, self.offsets)
        for key, now in storages(call).items():
            names = [name for name, t in call.tensors().items() if t.untyped_storage().data_ptr() == key]
            before, after = self.before[key], now
            for name, places in written.items():
                tensor = getattr(call, name)
                if tensor is None or tensor.untyped_storage().data_ptr() != key:
                    continue
                after = after.clone()
                old, new = _view_on(before, tensor), _view_on(after, tensor)
                for place in places:
                    new[place] = old[place]
            if not torch.equal(before, after):
                at = int((before != after).nonzero()[0])
                state = bool(set(names) & set(written))
                kind = "a place it was not given" if state else "an input"
                raise Violation(
                    f"wrote to {kind}: {' and '.join(names)} changed at byte {at} of its storage",
                    code=RejectCode.CANARY if state else RejectCode.INPUT_MODIFIED,
                )

    def check_output(self) -> None:
        """Raise Violation if rows beyond the last offset lost their poison, or the guards around changed."""
        out = self.out
        rest = out.detach().flatten(0, 1)[self.offsets[-1] :].contiguous()
        if not torch.equal(bits(rest), bits(torch.full_like(rest, self.poison))):
            raise Violation("wrote output rows beyond the last offset", code=RejectCode.CANARY)
        storage = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
        image = storage.clone()
        _view_on(image, out).fill_(_GUARD)
        if not torch.equal(image, torch.full_like(image, _GUARD)):
            raise Violation("wrote around the output", code=RejectCode.CANARY)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same size, so that NaN equals itself and -0 is not 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(kinds[t.element_size()])


def guarded(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, stride: Sequence[int] | None = None
) -> torch.Tensor:
    """An output tensor inside a larger storage full of a known value; packed unless ``stride`` says otherwise."""
    packed = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    stride = packed if stride is None else stride
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    storage = torch.full((span + 2 * GUARD_ELEMENTS,), _GUARD, dtype=dtype, device=device)
    return storage.as_strided(tuple(shape), tuple(stride), GUARD_ELEMENTS)


def _offsets(call: Call) -> tuple[int, ...]:
    if call.lengths_on_host:
        return call.offsets
    assert call.cu_seqlens is not None
    return tuple(call.cu_seqlens.tolist())


def storages(call: Call) -> dict[int, torch.Tensor]:
    """Every storage behind the call's tensors but the output's, as bytes."""
    found: dict[int, torch.Tensor] = {}
    for name, t in call.tensors().items():
        if name != "out" and t.untyped_storage().nbytes():
            storage = t.untyped_storage()
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)
    return found


def _view_on(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view on the bytes ``data`` placed as ``like`` is placed in its own storage."""
    blank = torch.empty(0, dtype=like.dtype, device=like.device)
    return blank.set_(data.untyped_storage(), like.storage_offset(), like.size(), like.stride())


def _written(call: Call, offsets: tuple[int, ...]) -> dict[str, list[tuple[int, ...] | tuple[int, slice]]]:
    """The places a call may write, by tensor: slots of sequences with tokens, and the steps they store."""
    lengths = [y - x for x, y in pairwise(offsets)]
    places: dict[str, list[tuple[int, ...] | tuple[int, slice]]] = {"pool": [], "intermediates": []}
    if call.write_slots is not None:
        slots = call.write_slots.tolist()
        places["pool"] = [(slot,) for slot, length in zip(slots, lengths, strict=True) if slot >= 0 and length]
    if call.intermediate_rows is not None:
        rows = call.intermediate_rows.tolist()
        places["intermediates"] = [
            (row, slice(0, length)) for row, length in zip(rows, lengths, strict=True) if row >= 0 and length
        ]
    return places
