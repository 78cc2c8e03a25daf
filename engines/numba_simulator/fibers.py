"""A thread block on greenlets: barriers, warp operations, schedules, and what a GPU would hang or race on.

Each CUDA thread is a greenlet that runs until it waits for its warp or its block. Only the scheduler decides who runs
next, so a schedule is a choice of order, and a run is repeatable. A warp can run ahead of the others as far as the
next block barrier: that is what brings a missing barrier to light, which lockstep and uniformly random orders hide.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet

__all__ = ["SCHEDULES", "BlockFault", "Fiber", "Schedule", "run_block"]

WARP = 32


class BlockFault(RuntimeError):
    """What real hardware would deadlock on, or leave undefined: a divergent barrier, a shuffle from an absent lane."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Who runs next.

    Attributes:
        order: ``lockstep`` (all warps to their next wait, in turn), ``first`` or ``last`` (the lowest or highest warp
            that can run, as far as it can), ``random``.
        backwards: lanes of a warp run from the highest down.
        seed: of the random order.
    """

    name: str
    order: str = "lockstep"
    backwards: bool = False
    seed: int = 0


#: Results may not depend on which of these is used.
SCHEDULES = (
    Schedule("lockstep"),
    Schedule("lockstep, lanes backwards", backwards=True),
    Schedule("first warp runs ahead", "first"),
    Schedule("last warp runs ahead", "last"),
    Schedule("last warp runs ahead, lanes backwards", "last", backwards=True),
    Schedule("random 1", "random", seed=1),
    Schedule("random 2", "random", backwards=True, seed=2),
)


class Fiber:
    """One CUDA thread.

    Attributes:
        tid: index in the block; thread: its greenlet.
        waiting: None while runnable, ``"block"``, or the lane mask of the warp operation it waits at.
        operation: name of that operation: lanes that meet must have called the same one.
        posted: value offered in that operation; posted values of the other lanes come back by ``exchange``.
    """

    __slots__ = ("block", "operation", "posted", "thread", "tid", "waiting")

    def __init__(self, block: _Block, tid: int, body: Callable[[], None]) -> None:
        self.block = block
        self.tid = tid
        self.thread: greenlet.greenlet = greenlet.greenlet(body)
        self.waiting: int | str | None = None
        self.operation = ""
        self.posted: Any = None

    @property
    def lane(self) -> int:
        return self.tid % WARP

    def wait_for_block(self) -> None:
        """``syncthreads``."""
        self.waiting = "block"
        self.block.scheduler.switch()

    def exchange(self, operation: str, mask: int, value: Any) -> dict[int, Any]:
        """Meet the lanes of ``mask`` and return what each of them offered, by lane.

        Raises:
            BlockFault: the mask does not name the caller, as hardware leaves undefined.
        """
        mask &= 0xFFFFFFFF
        if not mask >> self.lane & 1:
            raise BlockFault(f"lane {self.lane} calls {operation} with mask {mask:#010x}, which does not name it")
        self.waiting, self.operation, self.posted = mask, operation, value
        offered: dict[int, Any] = self.block.scheduler.switch()
        return offered


class _Block:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.scheduler = greenlet.getcurrent()
        self.random = random.Random(schedule.seed)


def run_block(
    threads: int, body: Callable[[], None], schedule: Schedule, entered: Callable[[Fiber | None], None]
) -> None:
    """Run ``body`` once per thread of one block, to the end.

    Args:
        threads: size of the block.
        body: the kernel with its arguments bound; asks ``entered``'s last argument who it is.
        entered: told which fiber runs now, and None when none does.

    Raises:
        BlockFault: threads wait for others that will never come.
        Exception: whatever a thread raised, with the thread named in a note.
    """
    block = _Block(schedule)
    fibers = [Fiber(block, tid, body) for tid in range(threads)]
    warps = [fibers[first : first + WARP] for first in range(0, threads, WARP)]
    try:
        _schedule(block, warps, entered)
    finally:
        entered(None)


def _schedule(block: _Block, warps: list[list[Fiber]], entered: Callable[[Fiber | None], None]) -> None:
    live = list(range(len(warps)))
    while live:
        progressed = False
        for w in _order(block, live):
            moved = _advance(block, warps[w], entered)
            progressed = progressed or moved
            if moved and block.schedule.order != "lockstep":
                break  # the choice of who goes on is made anew, so a warp that can run on does
        live = [w for w in live if any(not f.thread.dead for f in warps[w])]
        if not live or progressed:
            continue
        waiting = [f for w in live for f in warps[w] if not f.thread.dead]
        exited = any(f.thread.dead for warp in warps for f in warp)
        if exited or any(f.waiting != "block" for f in waiting):
            raise BlockFault(f"deadlock: {_describe(waiting)}" + (", others have returned" if exited else ""))
        for fiber in waiting:
            fiber.waiting = None


def _order(block: _Block, live: list[int]) -> list[int]:
    match block.schedule.order:
        case "last":
            return live[::-1]
        case "random":
            return block.random.sample(live, len(live))
        case _:
            return live


def _advance(block: _Block, warp: list[Fiber], entered: Callable[[Fiber | None], None]) -> bool:
    """Let every runnable lane of a warp run to its next wait, then complete what the lanes meet at."""
    runnable = [f for f in warp if f.waiting is None and not f.thread.dead]
    for fiber in reversed(runnable) if block.schedule.backwards else runnable:
        _resume(fiber, None, entered)
    met = list(_meetings(warp))
    for group in met:
        offered = {f.lane: f.posted for f in group}
        for fiber in reversed(group) if block.schedule.backwards else group:
            fiber.waiting = None
        for fiber in reversed(group) if block.schedule.backwards else group:
            _resume(fiber, offered, entered)
    return bool(runnable or met)


def _resume(fiber: Fiber, value: Any, entered: Callable[[Fiber | None], None]) -> None:
    entered(fiber)
    try:
        fiber.thread.switch() if value is None else fiber.thread.switch(value)
    except Exception as error:
        error.add_note(f"in thread {fiber.tid} (warp {fiber.tid // WARP}, lane {fiber.lane})")
        raise


def _meetings(warp: list[Fiber]) -> Iterator[list[Fiber]]:
    """Groups of lanes that wait at one warp operation with nobody missing."""
    waiting: dict[int, list[Fiber]] = {}
    for fiber in warp:
        if isinstance(fiber.waiting, int):
            waiting.setdefault(fiber.waiting, []).append(fiber)
    for mask, group in waiting.items():
        names = {fiber.operation for fiber in group}
        absent = [fiber.lane for fiber in warp if mask >> fiber.lane & 1 and fiber.thread.dead]
        beyond = mask >> len(warp)
        if absent or beyond:
            raise BlockFault(f"{sorted(names)} with mask {mask:#010x} names lanes that have returned or never were")
        if len(group) == mask.bit_count():
            if len(names) > 1:
                raise BlockFault(f"lanes of one warp meet at different operations: {sorted(names)}")
            yield group


def _describe(waiting: list[Fiber]) -> str:
    at: dict[str, int] = {}
    for fiber in waiting:
        what = "syncthreads" if fiber.waiting == "block" else fiber.operation
        at[what] = at.get(what, 0) + 1
    return "divergent barrier: " + ", ".join(f"{count} threads at {what}" for what, count in sorted(at.items()))
