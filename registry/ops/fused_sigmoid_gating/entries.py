"""Entries: the kinds of calls an op knows, bounded in number, found by the shapes of q and v."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable
from typing import Any

from ...dispatch import Dispatcher
from .entry import Entry

__all__ = ["MAX_ALIKE", "MAX_ENTRIES", "RECENT", "Entries"]

#: Entries kept per op; beyond this the oldest go.
MAX_ENTRIES = 4096
#: Entries of calls with the same shapes, which are looked through one by one.
MAX_ALIKE = 32
#: Entries that are tried before any table is asked: a model's layers, or its drafts and checks, take turns.
RECENT = 4


class Entries:
    """The entries of one op, bounded in number, by the shapes of q and v.

    Attributes:
        recent: the entries that came last (none at first, at most RECENT): what the hot path tries first, in order.
        hit: called once per call that an entry serves: counts them, from any thread, for the price of a C call, and
            returns the call's number.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._alike: dict[Hashable, tuple[Entry, ...]] = {}
        self._count = 0
        self._evicted = 0
        self._misses = 0
        self._lock = threading.Lock()
        self._hits = itertools.count()
        self._readings = 0
        self.hit = self._hits.__next__
        self._turn: tuple[Entry, int] | None = None
        self.recent: tuple[Entry, ...] = ()
        dispatcher.watch(self.clear)

    def alike(self, q: Any, v: Any) -> tuple[Entry, ...]:
        """The entries for these shapes; none for what has no shape."""
        try:
            return self._alike.get((q.shape, v.shape), ())
        except (AttributeError, TypeError):
            return ()

    def served(self, entry: Entry, number: int) -> None:
        """``entry`` served as the ``number``-th call, and was not tried first.

        It will be, if it was not among the recent ones, or comes twice in a row; entries that take turns stay put.
        """
        before, self._turn = self._turn, (entry, number)
        if before != (entry, number - 1) and any(entry is known for known in self.recent):
            return
        with self._lock:
            if any(entry is known for known in self._alike.get(entry.shapes, ())):  # else it was dropped meanwhile
                self._came(entry)

    def add(self, entry: Entry, generation: int) -> None:
        """Keep ``entry``, unless what decided it was dropped since ``generation``."""
        with self._lock:
            if generation != self._dispatcher.generation:
                return
            known = self._alike.get(entry.shapes, ())
            if len(known) >= MAX_ALIKE:
                known = known[1:]
                self._dropped(1)
            self._alike[entry.shapes] = (*known, entry)
            self._count += 1
            while self._count > MAX_ENTRIES:
                self._dropped(len(self._alike.pop(next(iter(self._alike)))))
            self._came(entry)

    def _came(self, entry: Entry) -> None:
        self.recent = (entry, *(known for known in self.recent if known is not entry))[:RECENT]

    def _dropped(self, count: int) -> None:
        self._count -= count
        self._evicted += count

    def missed(self) -> None:
        """A call was not recognised."""
        with self._lock:
            self._misses += 1

    def clear(self) -> None:
        """Drop all entries. The lock is made anew: in a forked child nobody would release the old one."""
        lock = self._lock = threading.Lock()
        with lock:
            self._alike.clear()
            self._count = 0
            self._turn = None
            self.recent = ()

    def counters(self) -> dict[str, int]:
        """``hits``, ``misses`` (calls), ``entries`` and ``evicted`` (entries), since the op was made."""
        with self._lock:
            hits = self.hit() - self._readings  # reading the counter counts, too
            self._readings += 1
            return {"hits": hits, "misses": self._misses, "entries": self._count, "evicted": self._evicted}
