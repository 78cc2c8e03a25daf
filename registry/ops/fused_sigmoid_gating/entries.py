"""Entries: the kinds of calls an op knows, bounded in number, found by the shapes of q and v."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable
from typing import Any

from ...dispatch import Dispatcher
from .entry import Entry

__all__ = ["MAX_ALIKE", "MAX_ENTRIES", "Entries"]

#: Entries kept per op; beyond this the oldest go.
MAX_ENTRIES = 4096
#: Entries of calls with the same shapes, which are looked through one by one.
MAX_ALIKE = 32


class Entries:
    """The entries of one op, bounded in number, by the shapes of q and v.

    Attributes:
        recent: the entry that served last, alone in a tuple (empty at first): what the hot path tries first.
        hit: called once per call that an entry serves: counts them, from any thread, for the price of a C call.
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
        self.recent: tuple[Entry, ...] = ()
        dispatcher.watch(self.clear)

    def alike(self, q: Any, v: Any) -> tuple[Entry, ...]:
        """The entries for these shapes; none for what has no shape."""
        try:
            return self._alike.get((q.shape, v.shape), ())
        except (AttributeError, TypeError):
            return ()

    def promote(self, entry: Entry) -> None:
        """``entry`` served: try it first next time."""
        with self._lock:
            if any(entry is known for known in self._alike.get(entry.shapes, ())):  # else it was dropped meanwhile
                self.recent = (entry,)

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
            self.recent = (entry,)

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
            self.recent = ()

    def counters(self) -> dict[str, int]:
        """``hits``, ``misses`` (calls), ``entries`` and ``evicted`` (entries), since the op was made."""
        with self._lock:
            hits = self.hit() - self._readings  # reading the counter counts, too
            self._readings += 1
            return {"hits": hits, "misses": self._misses, "entries": self._count, "evicted": self._evicted}
