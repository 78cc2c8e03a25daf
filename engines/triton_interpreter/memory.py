"""Every address a kernel touches, against the elements it was given and against what other programs touch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...registry.conformance.check import Violation
from ...registry.decision import RejectCode
from .execution import Executor, Program

__all__ = ["Watch", "watched"]

_NOBODY, _MANY = -1, -2


class Watch:
    """The elements of some tensors, and who has touched them in the launch that runs.

    An element is known by its address. Gaps between strides are no elements: touching one is an error.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self.program = _NOBODY
        self.epoch = 0
        self._coordinates: list[Program] = []
        self._index()

    def include(self, name: str, tensor: torch.Tensor) -> None:
        """These elements too, from the next launch on: memory that launches of a call leave to one another."""
        self._tensors[name] = tensor
        self._index()

    def _index(self) -> None:
        parts = [(name, *_elements(t)) for name, t in self._tensors.items() if t.numel()]
        addresses = np.concatenate([p[1] for p in parts]) if parts else np.empty(0, np.uint64)
        sizes = np.concatenate([np.full(len(p[1]), p[2], np.int64) for p in parts]) if parts else np.empty(0, np.int64)
        self.addresses, first = np.unique(addresses, return_index=True)
        self.sizes = sizes[first]
        self.names = tuple(self._tensors)
        self.begin(None)

    def begin(self, program: Program | None) -> None:
        """The next program starts; None: the launch is over, and memory may be read again."""
        if program is None:
            count = len(self.addresses)
            self.writer = np.full(count, _NOBODY, np.int64)
            self.reader = np.full(count, _NOBODY, np.int64)
            self.written_in = np.full(count, _NOBODY, np.int64)
            self._coordinates.clear()
        else:
            self.program = len(self._coordinates)
            self._coordinates.append(program)
        self.epoch += 1

    def barrier(self) -> None:
        """What was stored before may be read back by any thread of the program."""
        self.epoch += 1

    def loaded(self, addresses: NDArray[np.uint64], size: int) -> None:
        """Raise Violation unless every address is an element, and none of another program's or unsynchronised."""
        at = self._find("loads", addresses, size)
        others = (self.writer[at] != _NOBODY) & (self.writer[at] != self.program)
        if others.any():
            writer = self._coordinates[int(self.writer[at][others][0])]
            raise Violation(f"race: program {self._here} loads what program {writer} stores")
        fresh = (self.writer[at] == self.program) & (self.written_in[at] == self.epoch)
        if fresh.any():
            raise Violation(f"program {self._here} loads what its threads have stored, with no barrier between")
        seen = self.reader[at]
        self.reader[at] = np.where((seen == _NOBODY) | (seen == self.program), self.program, _MANY)

    def stored(self, addresses: NDArray[np.uint64], size: int) -> None:
        """As :meth:`loaded`; also, no two lanes of one store may name one element."""
        at = self._find("stores", addresses, size)
        if len(np.unique(at)) != len(at):
            raise Violation(f"program {self._here} stores twice to one element in one instruction")
        for what, seen in (("stores to", self.writer[at]), ("loads from", self.reader[at])):
            others = (seen != _NOBODY) & (seen != self.program)
            if others.any():
                raise Violation(f"race: program {self._here} stores where another program {what}")
        self.writer[at] = self.program
        self.written_in[at] = self.epoch

    @property
    def _here(self) -> Program:
        return self._coordinates[self.program]

    def _find(self, what: str, addresses: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
        at = np.searchsorted(self.addresses, addresses)
        inside = at < len(self.addresses)
        at = np.where(inside, at, 0)
        if len(self.addresses):
            inside &= (self.addresses[at] == addresses) & (self.sizes[at] == size)
        if not inside.all():
            wrong = int((~inside).sum())
            raise Violation(
                f"program {self._here} {what} {wrong} of {len(addresses)} elements that belong to no tensor of the "
                f"call ({', '.join(self.names)})",
                code=RejectCode.CRASH,
            )
        return at


def _elements(tensor: torch.Tensor) -> tuple[NDArray[np.uint64], int]:
    """Addresses of a tensor's elements, and an element's bytes."""
    offsets = torch.zeros((), dtype=torch.int64)
    for count, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(count) * stride
    size = tensor.element_size()
    return np.uint64(tensor.data_ptr()) + (offsets.flatten() * size).numpy().astype(np.uint64), size


@contextmanager
def watched(interpreter: Any, executor: Executor, tensors: Mapping[str, torch.Tensor]) -> Iterator[Watch]:
    """Check every load and store of the launches inside."""
    watch = Watch(tensors)
    builder = type(interpreter.interpreter_builder)
    load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier

    def active(pointers: Any, mask: Any) -> tuple[NDArray[np.uint64], int]:
        data, on = np.broadcast_arrays(pointers.data, mask.data)
        return data[on.astype(bool)], max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.loaded(*active(pointers, mask))
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.stored(*active(pointers, mask))
        return store(self, pointers, value, mask, *rest, **named)

    def noted_barrier(self: Any) -> Any:
        watch.barrier()
        return barrier(self)

    before, lent = executor.between, executor.lent
    executor.between, executor.lent = watch.begin, watch.include
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_barrier = noted_barrier
    try:
        yield watch
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_barrier = barrier
        executor.between, executor.lent = before, lent
