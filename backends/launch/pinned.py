"""The repeated call: addresses into a prepared block, the current stream, one driver call. Every line counts."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch

from . import forks
from .compiler import Layout
from .driver import NO_CONTEXT, Driver, Kernel, pointer
from .frame import Frame

__all__ = ["pinned"]

_WORD = 8
_address = torch.Tensor.data_ptr
#: A frame, the kernel's handle on the device, bytes of scratch memory for all blocks.
_Form = tuple[Frame, Any, int]


def pinned(
    layout: Layout,
    device: int | None,
    driver: Driver,
    kernel: Callable[[bool], Kernel],
    failed: Callable[[str], Exception],
    op: str,
) -> Callable[..., None]:
    """The runner of calls of one layout, all their tensors on one device.

    It also takes the address of memory that several kernels share (``chain.py``), in place of its own scratch memory.

    Args:
        layout: its grid has no 0.
        kernel: the kernel for tensors that are aligned (True) or not, ready on ``device``; asked once for each.
        failed: the error to raise, from words. op: whose call it is.
    """
    order = [index for index, _ in layout.places]
    chosen = itemgetter(*order)
    vectors = tuple(order.index(index) for index in layout.vectors) if layout.wide else ()
    first, fill = layout.places[0][1], _fill(layout)
    launch, stream, current, on = driver.library.cuLaunchKernelEx, driver.stream, driver.device, driver.on
    scratch_at = -1 if layout.scratch is None else layout.scratch // _WORD
    usual, blocks = layout.wide, math.prod(layout.grid)
    process = forks.process
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

    def run(tensors: tuple[Any, ...], workspace: int = 0) -> None:
        if process.forked:
            raise forks.error(op)
        addresses = [*map(_address, chosen(tensors))]
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
        if scratch:
            # Freed when this returns, for what this stream does next: after the kernel.
            memory = torch.empty(scratch, dtype=torch.uint8, device=device)
            words[scratch_at] = memory.data_ptr()
        elif workspace:
            words[scratch_at] = workspace
        words[stream_at] = stream(device)
        if device == current():
            code = launch(config_at, handle, None, extra_at)
        else:
            with on(device):
                code = launch(config_at, handle, None, extra_at)
        if code:
            if code == NO_CONTEXT:  # is this the thread's first work with CUDA?
                with driver.awake(device):
                    code = launch(config_at, handle, None, extra_at)
            if code:
                raise failed(driver.words(code))

    return run


def _fill(layout: Layout) -> Callable[..., None]:
    """Writes addresses into a frame's words: ``fill(words, first byte, *addresses)``.

    One ``struct`` for all of them where nothing but zeros lies between, a loop where strides do. The format is the
    machine's own: ``P`` takes a third less time than ``q``.
    """
    at = [place for _, place in layout.places]
    gaps = [b - a - _WORD for a, b in pairwise(at)]
    between = [layout.block[a + _WORD : b] for a, b in pairwise(at)]
    if all(gap >= 0 for gap in gaps) and not any(map(any, between)):
        return struct.Struct("@P" + "".join(f"{gap}xP" for gap in gaps)).pack_into
    places = [place // _WORD for place in at]

    def fill(words: array[int], _first: int, *addresses: int) -> None:
        for place, address in zip(places, addresses, strict=True):
            words[place] = address

    return fill
