"""Calls taken apart by addresses: no view is made, and no part's call.

What the kernels of a run are given lies some bytes behind what the whole call is given: rows, entries of slots. How
many bytes follows from the batch's layout, and from strides that calls of one kind have in common. So a layout that was
met before, by an earlier layer, costs the addresses of the whole call's tensors, some sums and the launches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

import torch

from ...registry.backend import Runner
from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call
from ...registry.ops.fused_sigmoid_gating.guards import guard, plain
from ...registry.varlen.layout import SequenceLayout
from ...registry.varlen.runs import Run
from ..launch import forks
from ..launch.launcher import Runner as Launched
from ..launch.pinned import Prepared, address, chooser
from .plans import Group, Plan, nothing, one_stream, two_streams
from .streams import SideStreams
from .subcall import PER_SEQUENCE, PER_TOKEN, call_of

__all__ = ["MOST_KINDS", "MOST_PLANS", "MOST_PREPARED", "Addressed", "Assigned", "Kinds"]

_OP = "fused_sigmoid_gating"
#: Kinds of calls that a bound runner knows again by itself; the op's hot path keeps those of its calls.
MOST_KINDS = 4
#: Layouts that a kind of call remembers: layers share one, and batches may take turns.
MOST_PLANS = 2
#: Launches of runs that a bound runner remembers, of all kinds and sizes; beyond, the oldest go.
MOST_PREPARED = 128

#: A run on its side (True: long), what runs it, and None in place of the run for the batch as it came.
Assigned = tuple[bool, Runner, Run | None]

#: All of a call that is neither a tensor nor the layout.
_SCALARS = tuple(field.name for field in fields(Call) if field.name not in (*TENSORS, "layout"))
_scalars_of = attrgetter(*_SCALARS)
_tensors_of: Callable[[Call], tuple[Any, ...]] = attrgetter(*TENSORS)
_CU_SEQLENS, _WRITE_SLOTS = TENSORS.index("cu_seqlens"), TENSORS.index("write_slots")


class _Remembered:
    """Launches of runs by the kind of the whole call, the run's runner, its sequences and its rows."""

    def __init__(self) -> None:
        self._by_run: dict[tuple[Addressed, Runner, int, int], Prepared] = {}
        self._lock = threading.Lock()
        self.get = self._by_run.get

    def add(self, run: tuple[Addressed, Runner, int, int], prepared: Prepared) -> None:
        with self._lock:
            if len(self._by_run) >= MOST_PREPARED and run not in self._by_run:
                del self._by_run[next(iter(self._by_run))]
            self._by_run[run] = prepared

    def __len__(self) -> int:
        return len(self._by_run)


class Addressed:
    """The runner of calls of one kind, in which all but addresses, contents and the layout is the same.

    Safe to call from several threads, on several streams. Keeps no tensor alive.

    Args:
        call: one of them, with its output and a layout.
        assigned: the runs of a layout and what runs each.
        whole: runs a call that cannot be taken apart so, because somebody's kernels are not launched by address.
        streams: for the long part; None: everything on the current stream.
        remembered: the launches of runs met before, of this kind and others.
    """

    def __init__(
        self,
        call: Call,
        assigned: Callable[[SequenceLayout], Sequence[Assigned]],
        whole: Callable[[Call], None],
        streams: SideStreams | None,
        remembered: _Remembered,
    ) -> None:
        tensors = _tensors_of(call)
        given = [index for index, tensor in enumerate(tensors) if tensor is not None]
        self._given = chooser(given)
        self._at = {index: at for at, index in enumerate(given)}
        self._bytes = {index: _bytes_between(TENSORS[index], tensors[index]) for index in given}
        self._scalars, self._in_place = _scalars_of(call), call.write_slots is call.read_slots
        self._absent = [tensor is None for tensor in tensors]
        # torch's guards refuse a tensor that is given twice.
        self._guarded = chooser([i for i in given if not (self._in_place and i == _WRITE_SLOTS)])
        self._guard = guard(self._guarded(tensors))
        self._n, self._rows, self._device = call.n, call.q.shape[1], call.q.device
        self._assigned, self._whole, self._streams = assigned, whole, streams
        self._plans: tuple[tuple[object, Plan | None], ...] = ()
        self._remembered = remembered

    def __call__(self, call: Call) -> None:
        """Run ``call``, one of them."""
        assert call.layout is not None
        self.run(_tensors_of(call), call.layout)

    def run(self, tensors: tuple[Any, ...], layout: SequenceLayout) -> None:
        """Run the call of these tensors, in the op's declared order, the output among them."""
        if forks.process.forked:
            raise forks.error(_OP)
        identity, runs = layout.identity, None
        for known in self._plans:
            if known[0] is identity:
                plan = known[1]
                break
        else:
            plan, runs = self._planned(tensors, layout)
        if plan is None:
            self._whole(self._call(tensors, layout))
        else:
            plan([*map(address, self._given(tensors))])
        del runs  # whose offsets the layout has not kept, if a graph is captured: until here

    def ready(self, call: Call) -> bool:
        """Compile what ``call`` needs, at its own addresses; whether it will be taken apart by addresses."""
        assert call.layout is not None
        return self._planned(_tensors_of(call), call.layout, anew=True)[0] is not None

    def serves(self, call: Call) -> bool:
        """Whether ``call`` is one of them."""
        tensors = _tensors_of(call)
        return (
            _scalars_of(call) == self._scalars
            and (call.write_slots is call.read_slots) is self._in_place
            and [tensor is None for tensor in tensors] == self._absent
            and self._guard(*self._guarded(tensors))
        )

    def _planned(
        self, tensors: tuple[Any, ...], layout: SequenceLayout, anew: bool = False
    ) -> tuple[Plan | None, Sequence[Assigned]]:
        """The plan of a layout, and the runs that it is made of, whose tensors have to outlive its use.

        ``anew``: look at the addresses, too, to compile what is aligned like them.
        """
        runs = self._assigned(layout)
        found = [(long, run, self._prepared_for(runner, run, tensors, layout, anew)) for long, runner, run in runs]
        parts = [(long, run, prepared) for long, run, prepared in found if prepared is not None]
        plan = self._plan(parts, tensors) if len(parts) == len(found) else None
        # The offsets of runs that are met in a capture first are that capture's own.
        if not any(prepared.driver.capturing() for _, _, prepared in parts[:1]):
            others = (known for known in self._plans if known[0] is not layout.identity)
            self._plans = ((layout.identity, plan), *others)[:MOST_PLANS]
        return plan, runs

    def _prepared_for(
        self, runner: Runner, run: Run | None, tensors: tuple[Any, ...], layout: SequenceLayout, anew: bool
    ) -> Prepared | None:
        """The launches of one run; None where ``runner`` does not tell them."""
        if not isinstance(runner, Launched):
            return None
        if run is None:
            size = self._n, self._rows
        else:
            size = run.span.last - run.span.first, run.span.stop - run.span.start
        key = (self, runner, *size)
        prepared = None if anew else self._remembered.get(key)
        if prepared is None:
            call = self._call(tensors, layout)
            prepared = runner.prepared(call if run is None else call_of(call, run))
            self._remembered.add(key, prepared)
        return prepared

    def _call(self, tensors: tuple[Any, ...], layout: SequenceLayout) -> Call:
        scalars = dict(zip(_SCALARS, self._scalars, strict=True))
        return Call(**dict(zip(TENSORS, tensors, strict=True)), layout=layout, **scalars)

    def _plan(self, parts: Sequence[tuple[bool, Run | None, Prepared]], tensors: tuple[Any, ...]) -> Plan:
        if not parts:
            return nothing
        sides: dict[bool, list[Group]] = {True: [], False: []}
        needs = {True: 0, False: 0}
        in_order: list[Group] = []
        for long, run, prepared in parts:
            groups = self._groups(run, prepared, tensors)
            in_order += groups
            sides[long] += groups
            needs[long] = max(needs[long], prepared.workspace)
        driver, device = parts[0][2].driver, self._device
        if self._streams is None or not (sides[True] and sides[False]):
            return one_stream(in_order, max(needs.values()), driver, device)
        return two_streams(sides, needs, driver, device, self._streams)

    def _groups(self, run: Run | None, prepared: Prepared, tensors: tuple[Any, ...]) -> list[Group]:
        groups: list[Group] = []
        for step in prepared.steps:
            offsets = None
            if run is not None and run.span.first:
                offsets = tuple(self._behind(index, run, tensors) for index in step.order)
            pick = chooser([self._at[index] for index in step.order])
            groups.append((pick, offsets, step.launches, prepared.workspace > 0))
        return groups

    def _behind(self, index: int, run: Run, tensors: tuple[Any, ...]) -> int:
        """Bytes from a tensor's address to that of what the run is given of it."""
        if index == _CU_SEQLENS:  # a tensor of its own, which lives as long as the layout, and the whole's as well
            return int(run.layout.cu_seqlens.data_ptr() - tensors[index].data_ptr())
        per_token, per_sequence = self._bytes[index]
        return per_token * run.span.start + per_sequence * run.span.first


def _bytes_between(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes from a row to the next, and from a sequence's entry to the next; 0 of what a run has as a whole."""
    size = tensor.element_size()
    return (
        size * tensor.stride(1) if name in PER_TOKEN else 0,
        size * tensor.stride(0) if name in PER_SEQUENCE else 0,
    )


class Kinds:
    """The kinds of calls that a bound runner met last. Arguments as of :class:`Addressed`."""

    def __init__(
        self,
        assigned: Callable[[SequenceLayout], Sequence[Assigned]],
        whole: Callable[[Call], None],
        streams: SideStreams | None,
    ) -> None:
        self._remembered = _Remembered()
        self._made_of = assigned, whole, streams, self._remembered
        self._recent: tuple[Addressed, ...] = ()

    def of(self, call: Call) -> Addressed | None:
        """The runner of calls like ``call``, which has its output; None if it has no layout, offsets that are not its
        layout's, or tensors that are not torch's own.
        """
        if call.layout is None or call.layout.cu_seqlens is not call.cu_seqlens:
            return None
        for known in self._recent:
            if known.serves(call):
                return known
        if not all(plain(tensor) for tensor in call.tensors().values()):
            return None
        made = Addressed(call, *self._made_of)
        self._recent = (made, *self._recent)[:MOST_KINDS]
        return made
