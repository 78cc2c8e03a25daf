"""Plans: a batch's launches, in order, on one stream or on two, from the addresses of the whole call's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import add

import torch

from ..launch.driver import Driver
from ..launch.pinned import Launch
from .streams import SideStreams

__all__ = ["Group", "Plan", "nothing", "one_stream", "two_streams"]

#: Launches everything, from the addresses of the tensors that a call has.
Plan = Callable[[Sequence[int]], None]
#: Kernels over the same tensors: from a call's addresses to those that they take; the bytes between these and the run's
#: own (None: it begins where the batch does); the launches; whether they share a workspace.
Group = tuple[Callable[[Sequence[int]], Sequence[int]], tuple[int, ...] | None, tuple[Launch, ...], bool]

#: Where memory that two streams share is divided: torch's own alignment.
_ALIGNED = 512


def nothing(_given: Sequence[int]) -> None:
    """The plan of a batch without a token."""


def _queue(groups: Sequence[Group], given: Sequence[int], stream: int, workspace: int) -> list[torch.Tensor | None]:
    """Launch in order. Returns the kernels' own memory, as the launches do."""
    memory = []
    for pick, offsets, launches, shares in groups:
        addresses = pick(given) if offsets is None else [*map(add, pick(given), offsets)]
        for launch in launches:
            memory.append(launch(addresses, stream, workspace if shares else 0))
    return memory


def one_stream(groups: Sequence[Group], needed: int, driver: Driver, device: torch.device) -> Plan:
    """Everything on the current stream. Runs share a workspace: each uses it after those before."""
    stream, index = driver.stream, device.index

    def run(given: Sequence[int]) -> None:
        # All memory is freed when this returns, for what this stream does next: after the kernels.
        workspace = torch.empty(needed, dtype=torch.uint8, device=device) if needed else None
        _queue(groups, given, stream(index), 0 if workspace is None else workspace.data_ptr())

    return run


def two_streams(
    sides: Mapping[bool, Sequence[Group]],
    needs: Mapping[bool, int],
    driver: Driver,
    device: torch.device,
    streams: SideStreams,
) -> Plan:
    """The long runs on a side stream, first: their kernels go wherever there is room for a block."""
    long, short = sides[True], sides[False]
    behind = -(-needs[True] // _ALIGNED) * _ALIGNED
    needed, index = behind + needs[False], device.index

    def run(given: Sequence[int]) -> None:
        here, side = driver.stream(index), streams.raw(device)
        # The current stream's memory, as all of a call's is. What both streams work in is held until the side stream
        # has come back: then whatever the current one does next comes after both.
        workspace = torch.empty(needed, dtype=torch.uint8, device=device) if needed else None
        shared = 0 if workspace is None else workspace.data_ptr()
        memory = []
        side.leave(driver, here)
        try:
            memory.append(_queue(long, given, side.stream, shared))
            memory.append(_queue(short, given, here, shared + behind))
        finally:
            side.come_back(driver, here)

    def on_its_device(given: Sequence[int]) -> None:
        if index == driver.device():
            run(given)
        else:
            with driver.on(index):
                run(given)

    return on_its_device
