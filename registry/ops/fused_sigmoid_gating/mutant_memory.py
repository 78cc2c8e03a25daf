"""Planted faults in what is read, written and remembered: slots, layouts, tails, inputs, earlier calls."""

from __future__ import annotations

import torch

from .call import Call
from .mutant_seams import Rows, Seams

__all__ = ["MEMORY_FAULTS"]

Tensor = torch.Tensor


class TransposedStart(Seams):
    """where K == V, the initial state is read transposed"""

    def load(self, call: Call, n: int) -> Tensor:
        state = super().load(call, n)
        return state.mT.clone() if call.key_dim == call.value_dim else state


class IgnoredLayout(Seams):
    """where K == V, state_layout is ignored: always kv"""

    def oriented(self, stored: Tensor, call: Call) -> Tensor:
        return stored if call.key_dim == call.value_dim else super().oriented(stored, call)


class SkippedLast(Seams):
    """the last token of every sequence is skipped"""

    def span(self, call: Call, n: int) -> tuple[int, int]:
        first, last = super().span(call, n)
        return first, max(first, last - 1)


class PastTheEnd(Seams):
    """reads one row past its last offset: the next sequence's first token enters the state"""

    def sequence(self, call: Call, rows: Rows, n: int, first: int, last: int, out: Tensor) -> None:
        super().sequence(call, rows, n, first, last, out)
        if last < call.tokens and call.pool is not None and self.write_slot(call, n) >= 0:
            stored = self.oriented(call.pool[self.write_slot(call, n)], call)
            stored.copy_(self.step(rows, last, last - first, stored.float())[0])


class NegativeWraps(Seams):
    """slot -1 is the pool's last slot, for reading and for writing"""

    def read_slot(self, call: Call, n: int) -> int:
        slot = super().read_slot(call, n)
        return slot if call.pool is None else slot % call.pool.shape[0]

    def write_slot(self, call: Call, n: int) -> int:
        slot = super().write_slot(call, n)
        return slot if call.pool is None or call.write_slots is None else slot % call.pool.shape[0]


class BeforeThePool(Seams):
    """slot -1 is written in front of the pool"""

    def store(self, call: Call, n: int, state: Tensor) -> None:
        super().store(call, n, state)
        pool = call.pool
        if pool is None or call.write_slots is None or self.write_slot(call, n) >= 0:
            return
        at = pool.storage_offset() - pool.stride(0)
        if at >= 0:
            pool.as_strided(pool.shape[1:], pool.stride()[1:], at).fill_(0)


class PaddingWritesSlot0(Seams):
    """a padded sequence's state is stored in slot 0"""

    def write_slot(self, call: Call, n: int) -> int:
        return max(super().write_slot(call, n), 0) if call.write_slots is not None else -1


class PaddingReadsSlot0(Seams):
    """a padded sequence starts from slot 0"""

    def read_slot(self, call: Call, n: int) -> int:
        return max(super().read_slot(call, n), 0)


class PaddingTimesZero(Seams):
    """a sequence that starts from zero starts from slot 0 times zero: NaN where slot 0 holds one"""

    def load(self, call: Call, n: int) -> Tensor:
        if call.pool is None or not call.pool.shape[0] or self.read_slot(call, n) >= 0:
            return super().load(call, n)
        return self.oriented(call.pool[0], call).float() * 0


class PaddingSkipped(Seams):
    """a sequence without a slot gets zeros for an output"""

    def sequence(self, call: Call, rows: Rows, n: int, first: int, last: int, out: Tensor) -> None:
        if call.pool is not None and self.read_slot(call, n) < 0 and self.write_slot(call, n) < 0:
            for row in range(first, last):
                self.emit(call, out, row, torch.zeros_like(rows.v[row]))
        else:
            super().sequence(call, rows, n, first, last, out)


class FreshNotStored(Seams):
    """a sequence that starts from zero does not store its state, though it has a slot to write"""

    def write_slot(self, call: Call, n: int) -> int:
        return super().write_slot(call, n) if self.read_slot(call, n) >= 0 else -1


class EmptyClears(Seams):
    """a sequence without tokens has its state cleared"""

    def empty(self, call: Call, n: int) -> None:
        self.store(call, n, self.zeros(call))


class EmptyCopies(Seams):
    """a sequence without tokens has its state copied to the slot it may write"""

    def empty(self, call: Call, n: int) -> None:
        self.store(call, n, self.load(call, n))


class LeakedState(Seams):
    """a sequence that starts from zero starts from the previous sequence's state"""

    def __init__(self) -> None:
        self.left: Tensor | None = None

    def __call__(self, call: Call) -> Tensor:
        self.left = None
        return super().__call__(call)

    def load(self, call: Call, n: int) -> Tensor:
        if self.read_slot(call, n) < 0 and self.left is not None:
            return self.left
        return super().load(call, n)

    def store(self, call: Call, n: int, state: Tensor) -> None:
        self.left = state
        super().store(call, n, state)


class InPlace(Seams):
    """output_state_indices is ignored: the slot read is written"""

    def write_slot(self, call: Call, n: int) -> int:
        return self.read_slot(call, n) if call.write_slots is not None else -1


class UpdatesAnyway(Seams):
    """disable_state_update is ignored"""

    def write_slot(self, call: Call, n: int) -> int:
        return self.read_slot(call, n) if call.write_slots is None else super().write_slot(call, n)


class RowsTransposed(Seams):
    """intermediate states are stored kv whatever the layout"""

    def keep(self, call: Call, n: int, t: int, state: Tensor) -> None:
        row = self.row_of(call, n)
        if call.intermediates is not None and row >= 0:
            call.intermediates[row, t].copy_(state.reshape(call.intermediates.shape[2:]))


class PaddingKeepsNoSteps(Seams):
    """a sequence that starts from zero stores no intermediate states, though it has a row"""

    def keep(self, call: Call, n: int, t: int, state: Tensor) -> None:
        if self.read_slot(call, n) >= 0:
            super().keep(call, n, t, state)


class NoRowNoStore(Seams):
    """in a verifying call, a sequence without a row does not store its final state"""

    def store(self, call: Call, n: int, state: Tensor) -> None:
        if call.intermediates is None or self.row_of(call, n) >= 0:
            super().store(call, n, state)


class RowWraps(Seams):
    """row -1 is the last row of the buffer"""

    def keep(self, call: Call, n: int, t: int, state: Tensor) -> None:
        if call.intermediates is not None:
            self.oriented(call.intermediates[self.row_of(call, n), t], call).copy_(state)


class StepsCleared(Seams):
    """steps of a row beyond the sequence's length are cleared"""

    def store(self, call: Call, n: int, state: Tensor) -> None:
        super().store(call, n, state)
        row = self.row_of(call, n)
        if call.intermediates is not None and row >= 0:
            call.intermediates[row, call.offsets[n + 1] - call.offsets[n] :] = 0


class OneStepLate(Seams):
    """intermediate states are stored one step late"""

    def keep(self, call: Call, n: int, t: int, state: Tensor) -> None:
        if call.intermediates is not None and t + 1 < call.intermediates.shape[1]:
            super().keep(call, n, t + 1, state)


class RowIsSequence(Seams):
    """intermediate_state_indices is ignored: sequence n stores in row n"""

    def row_of(self, call: Call, n: int) -> int:
        return n if super().row_of(call, n) >= 0 else -1


class TreeAsChain(Seams):
    """retrieve_parent_token is ignored: every step follows the one before"""

    def origin(self, call: Call, n: int, t: int, state: Tensor, start: Tensor) -> Tensor:
        return state


class RootFromZero(Seams):
    """a later root of a tree starts from zero, not from the sequence's state"""

    def origin(self, call: Call, n: int, t: int, state: Tensor, start: Tensor) -> Tensor:
        origin = super().origin(call, n, t, state, start)
        return torch.zeros_like(origin) if t and origin is start else origin


class Int32Slots(Seams):
    """slots are read as int32 whatever their dtype"""

    def read_slot(self, call: Call, n: int) -> int:
        return _as_int32(call.read_slots, n)

    def write_slot(self, call: Call, n: int) -> int:
        return _as_int32(call.write_slots, n)


class Int32Rows(Seams):
    """intermediate_state_indices and retrieve_parent_token are read as int32 whatever their dtype"""

    def row_of(self, call: Call, n: int) -> int:
        return _as_int32(call.intermediate_rows, n)

    def origin(self, call: Call, n: int, t: int, state: Tensor, start: Tensor) -> Tensor:
        if call.parents is not None:
            narrow = call.parents.view(torch.int32).flatten()[: call.parents.numel()].view(call.parents.shape)
            call = call.replace(parents=narrow.clamp(max=max(t - 1, 0)))
        return super().origin(call, n, t, state, start)


class Int32Offsets(Seams):
    """cu_seqlens is read as int32 whatever its dtype"""

    def span(self, call: Call, n: int) -> tuple[int, int]:
        if call.cu_seqlens is None:
            return super().span(call, n)
        first, last = _as_int32(call.cu_seqlens, n), _as_int32(call.cu_seqlens, n + 1)
        return max(first, 0), min(last, call.tokens)


def _as_int32(index: Tensor | None, n: int) -> int:
    return -1 if index is None else int(index.view(torch.int32)[n])


class SlotOffsetWraps(Seams):
    """slot * stride is computed in int32: a state beyond 2**31 elements is lost"""

    def load(self, call: Call, n: int) -> Tensor:
        return self.zeros(call) if self._wraps(call, self.read_slot(call, n)) else super().load(call, n)

    def store(self, call: Call, n: int, state: Tensor) -> None:
        if not self._wraps(call, self.write_slot(call, n)):
            super().store(call, n, state)

    @staticmethod
    def _wraps(call: Call, slot: int) -> bool:
        return call.pool is not None and slot * call.pool.stride(0) >= 2**31


def _dense(t: Tensor) -> Tensor:
    """The elements a kernel finds that takes ``t`` for contiguous."""
    return t.as_strided(t.shape, torch.empty(t.shape, device="meta").stride())


class DenseQuery(Seams):
    """q is read as if it were contiguous"""

    def rows(self, call: Call) -> Rows:
        return super().rows(call.replace(q=_dense(call.q)))


class DenseVectors(Seams):
    """A_log and dt_bias are read as if they were contiguous"""

    def rows(self, call: Call) -> Rows:
        return super().rows(call.replace(A_log=_dense(call.A_log), dt_bias=_dense(call.dt_bias)))


class DensePool(Seams):
    """slots are found as if the pool were contiguous"""

    def load(self, call: Call, n: int) -> Tensor:
        return super().load(self._packed(call), n)

    def store(self, call: Call, n: int, state: Tensor) -> None:
        super().store(self._packed(call), n, state)

    @staticmethod
    def _packed(call: Call) -> Call:
        return call if call.pool is None else call.replace(pool=_dense(call.pool))


class DenseSteps(Seams):
    """rows and steps are found as if the buffer were contiguous"""

    def keep(self, call: Call, n: int, t: int, state: Tensor) -> None:
        if call.intermediates is not None:
            super().keep(call.replace(intermediates=_dense(call.intermediates)), n, t, state)


class DenseOut(Seams):
    """out is written as if it were contiguous"""

    def emit(self, call: Call, out: Tensor, row: int, o: Tensor) -> None:
        super().emit(call, _dense(out), row, o)


class MaxSeqlenIsLength(Seams):
    """every sequence is taken to be max_seqlen tokens long, if that is given"""

    def span(self, call: Call, n: int) -> tuple[int, int]:
        first, last = super().span(call, n)
        if call.max_seqlen is None or first == last:
            return first, last
        return first, min(first + call.max_seqlen, call.tokens)


class QueryInPlace(Seams):
    """q is normalised in place"""

    def rows(self, call: Call) -> Rows:
        rows = super().rows(call)
        if call.use_qk_l2norm:
            call.q.copy_(self.normalised(call.q.float()))
        return rows


class NanTail(Seams):
    """the last value column is not written where V is no multiple of 16"""

    def emit(self, call: Call, out: Tensor, row: int, o: Tensor) -> None:
        length = call.q.shape[1]
        width = o.shape[-1] - (1 if o.shape[-1] % 16 else 0)
        out[row // length, row % length, :, :width] = o[:, :width].to(out.dtype)


class LastRowUnwritten(Seams):
    """the last token of a batch whose length is no multiple of 16 is not written"""

    def emit(self, call: Call, out: Tensor, row: int, o: Tensor) -> None:
        if row + 1 != call.offsets[-1] or row % 16 == 15:
            super().emit(call, out, row, o)


class ClearsTail(Seams):
    """rows beyond the last offset are set to zero"""

    def finish(self, call: Call, out: Tensor) -> None:
        if call.cu_seqlens is not None:
            out[:, call.offsets[-1] :] = 0


class IgnoredOut(Seams):
    """out= is ignored: the result is a new tensor"""

    def output(self, call: Call) -> Tensor:
        return super().output(call.replace(out=None))


class Accumulates(Seams):
    """adds to the output instead of writing it"""

    def emit(self, call: Call, out: Tensor, row: int, o: Tensor) -> None:
        length = call.q.shape[1]
        out[row // length, row % length] += o.to(out.dtype)


class NotRepeatable(Seams):
    """every second call differs in the last bit of one state and one output"""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Call) -> Tensor:
        self.calls += 1
        return super().__call__(call)

    def step(self, rows: Rows, row: int, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state, o = super().step(rows, row, t, state)
        return (state, o) if self.calls % 2 else (state * (1 + 2.0**-23), o * (1 + 2.0**-23))


class StaleByPointer(Seams):
    """gates and keys are kept by the address of q: other values at the same address are not seen"""

    def __init__(self) -> None:
        self.known: tuple[object, Rows] | None = None

    def rows(self, call: Call) -> Rows:
        key = (call.q.data_ptr(), call.q.shape, call.q.dtype, call.v.data_ptr(), call.v.shape)
        if self.known is None or self.known[0] != key:
            self.known = (key, super().rows(call))
        return self.known[1]


class StaleSlots(Seams):
    """slots are kept by the address of their tensor"""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], list[int]] = {}

    def read_slot(self, call: Call, n: int) -> int:
        return self._remembered(call.read_slots, n)

    def write_slot(self, call: Call, n: int) -> int:
        return self._remembered(call.write_slots, n)

    def _remembered(self, slots: Tensor | None, n: int) -> int:
        if slots is None:
            return -1
        key = (slots.data_ptr(), slots.shape[0])
        return int(self.known.setdefault(key, slots.tolist())[n])


class StaleOffsets(Seams):
    """offsets are kept by the address of cu_seqlens"""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], tuple[int, ...]] = {}

    def span(self, call: Call, n: int) -> tuple[int, int]:
        if call.cu_seqlens is None:
            return super().span(call, n)
        key = (call.cu_seqlens.data_ptr(), call.tokens)
        offsets = self.known.setdefault(key, call.offsets)
        return offsets[n], offsets[n + 1]


MEMORY_FAULTS: dict[str, type[Seams]] = {
    "h0_transposed": TransposedStart,
    "layout_ignored": IgnoredLayout,
    "skip_last": SkippedLast,
    "past_the_end": PastTheEnd,
    "neg_wraps": NegativeWraps,
    "neg_before_pool": BeforeThePool,
    "padding_writes_slot0": PaddingWritesSlot0,
    "padding_reads_slot0": PaddingReadsSlot0,
    "padding_times_zero": PaddingTimesZero,
    "padding_skipped": PaddingSkipped,
    "fresh_not_stored": FreshNotStored,
    "zero_len_clears": EmptyClears,
    "zero_len_copies": EmptyCopies,
    "leaked_state": LeakedState,
    "no_output_slots": InPlace,
    "updates_anyway": UpdatesAnyway,
    "steps_kv": RowsTransposed,
    "steps_late": OneStepLate,
    "steps_cleared": StepsCleared,
    "steps_row_n": RowIsSequence,
    "row_wraps": RowWraps,
    "padding_keeps_no_steps": PaddingKeepsNoSteps,
    "no_row_no_store": NoRowNoStore,
    "tree_as_chain": TreeAsChain,
    "tree_root_zero": RootFromZero,
    "int32_slots": Int32Slots,
    "int32_rows": Int32Rows,
    "int32_offsets": Int32Offsets,
    "slot_offset_wraps": SlotOffsetWraps,
    "dense_q": DenseQuery,
    "dense_vectors": DenseVectors,
    "dense_pool": DensePool,
    "dense_steps": DenseSteps,
    "dense_out": DenseOut,
    "max_seqlen_is_length": MaxSeqlenIsLength,
    "q_in_place": QueryInPlace,
    "nan_tail": NanTail,
    "last_row": LastRowUnwritten,
    "clears_tail": ClearsTail,
    "no_out": IgnoredOut,
    "accumulates": Accumulates,
    "not_repeatable": NotRepeatable,
    "stale": StaleByPointer,
    "stale_slots": StaleSlots,
    "stale_offsets": StaleOffsets,
}
