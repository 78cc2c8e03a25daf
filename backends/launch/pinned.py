"""The repeated call: addresses into a prepared block, a stream, one driver call. Every line counts."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch

from . import forks
from .compiler import Layout
from .driver import NO_CONTEXT, Driver, Kernel, pointer
from .frame import Frame

__all__ = ["Launch", "Prepared", "Step", "address", "chooser", "pinned", "step_of"]

_WORD = 8
#: Of a tensor; of what is on a device, a number that only the device can use.
address = torch.Tensor.data_ptr
#: A frame, the kernel's handle on the device, bytes of scratch memory for all blocks.
_Form = tuple[Frame, Any, int]
#: ``launch(addresses, stream, workspace)``: the addresses of the tensors that the kernel takes, in its order; the raw
#: stream; the address of memory that a call's kernels share (0: none). It returns memory of the kernel's own, if that
#: needs some, allocated on torch's current stream: to be kept until what this stream does next comes after the kernel.
Launch = Callable[[Sequence[int], int, int], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Step:
    """Kernels over the same tensors, one after another.

    Attributes:
        order: of these tensors, their indices in ``TENSORS``.
        launches: of the kernels; each takes the tensors' addresses in that order.
    """

    order: tuple[int, ...]
    launches: tuple[Launch, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """All of a call's launches but the addresses and the stream. Of every thread's, for every stream.

    Attributes:
        steps: in order; none if there is nothing to do.
        workspace: bytes of memory that the kernels share; 0: they share none.
        device: of the tensors. driver: what launches.
    """

    steps: tuple[Step, ...]
    workspace: int
    device: torch.device
    driver: Driver


def pinned(calls: Prepared, op: str) -> Callable[[tuple[Any, ...]], None]:
    """The runner of such calls on torch's current stream, from their tensors. ``op``: whose calls they are."""
    if not calls.steps:
        return _nothing
    stream, index, process = calls.driver.stream, calls.device.index, forks.process
    if len(calls.steps) == len(calls.steps[0].launches) == 1 and not calls.workspace:
        chosen, [launch] = chooser(calls.steps[0].order), calls.steps[0].launches

        def run(tensors: tuple[Any, ...]) -> None:
            if process.forked:
                raise forks.error(op)
            # What it returns is freed at once, for what this stream does next: after the kernel.
            launch([*map(address, chosen(tensors))], stream(index), 0)

        return run

    steps = [(chooser(step.order), step.launches) for step in calls.steps]
    needed, device = calls.workspace, calls.device

    def run_all(tensors: tuple[Any, ...]) -> None:
        if process.forked:
            raise forks.error(op)
        # Freed when this returns, for what this stream does next: after the kernels.
        memory = torch.empty(needed, dtype=torch.uint8, device=device) if needed else None
        shared, here = 0 if memory is None else memory.data_ptr(), stream(index)
        for chosen, launches in steps:
            addresses = [*map(address, chosen(tensors))]
            for launch in launches:
                launch(addresses, here, shared)

    return run_all


def _nothing(_tensors: tuple[Any, ...]) -> None:
    """The form of calls without sequences or without tokens."""


def chooser(order: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """``itemgetter``, but a tuple of a single item, too."""
    if len(order) == 1:
        [at] = order
        return lambda items: (items[at],)
    return itemgetter(*order)


def step_of(
    layout: Layout,
    device: int | None,
    driver: Driver,
    kernel: Callable[[bool], Kernel],
    failed: Callable[[str], Exception],
) -> Step:
    """The launch of calls of one layout, all their tensors on one device.

    Args:
        layout: its grid has no 0.
        kernel: the kernel for tensors that are aligned (True) or not, ready on ``device``; asked once for each.
        failed: the error to raise, from words.
    """
    order = tuple(index for index, _ in layout.places)
    vectors = tuple(order.index(index) for index in layout.vectors) if layout.wide else ()
    first, fill = layout.places[0][1], _fill(layout)
    enqueue, current, on = driver.library.cuLaunchKernelEx, driver.device, driver.on
    scratch_at = -1 if layout.scratch is None else layout.scratch // _WORD
    usual, blocks = layout.wide, math.prod(layout.grid)
    # Triton's decode steps have five. Spelled out they take 0.12 us, in a loop 0.21.
    five = len(vectors) == 5
    i0, i1, i2, i3, i4 = vectors if five else (0,) * 5
    # Two names: a list of two, looked up by a bool, takes 0.03 us more.
    wide: _Form | None = None
    narrow: _Form | None = None

    def made(aligned: bool) -> _Form:
        nonlocal wide, narrow
        loaded = kernel(aligned)
        handle = pointer(loaded.function(device))
        form = Frame(layout, loaded), handle, loaded.image.scratch * loaded.image.cluster * blocks
        if aligned:
            wide = form
        else:
            narrow = form
        return form

    def launch(addresses: Sequence[int], stream: int, workspace: int) -> torch.Tensor | None:
        aligned = usual
        if five:
            bits = addresses[i0] | addresses[i1] | addresses[i2] | addresses[i3] | addresses[i4]
            aligned = not bits & 15
        elif vectors:
            for i in vectors:
                if addresses[i] & 15:
                    aligned = False
        frame, handle, scratch = (wide if aligned else narrow) or made(aligned)
        words, stream_at, config_at, extra_at = frame.state
        fill(words, first, *addresses)
        memory = None
        if scratch:
            memory = torch.empty(scratch, dtype=torch.uint8, device=device)
            words[scratch_at] = memory.data_ptr()
        elif workspace:
            words[scratch_at] = workspace
        words[stream_at] = stream
        if device == current():
            code = enqueue(config_at, handle, None, extra_at)
        else:
            with on(device):
                code = enqueue(config_at, handle, None, extra_at)
        if code:
            if code == NO_CONTEXT:  # is this the thread's first work with CUDA?
                with driver.awake(device):
                    code = enqueue(config_at, handle, None, extra_at)
            if code:
                raise failed(driver.words(code))
        return memory

    return Step(order, (launch,))


def _fill(layout: Layout) -> Callable[..., None]:
    """Writes addresses into a frame's words: ``fill(words, first byte, *addresses)``.

    One ``struct`` for all of them where nothing but zeros lies between, a loop where strides do. The format is the
    machine's own: ``P`` takes a third less time than ``q``.
    """
    at = tuple(place for _, place in layout.places)
    pack = _struct_of(at)
    if pack is not None and not any(any(layout.block[a + _WORD : b]) for a, b in pairwise(at) if b - a > _WORD):
        return pack
    places = [place // _WORD for place in at]

    def fill(words: array[int], _first: int, *addresses: int) -> None:
        for place, address in zip(places, addresses, strict=True):
            words[place] = address

    return fill


@lru_cache(maxsize=256)
def _struct_of(at: tuple[int, ...]) -> Callable[..., None] | None:
    """Writes words at these bytes, counted from the first one's, and zeros between them; None if they do not ascend."""
    gaps = [b - a - _WORD for a, b in pairwise(at)]
    if any(gap < 0 for gap in gaps):
        return None
    return struct.Struct("@P" + "".join(f"{gap}xP" for gap in gaps)).pack_into
