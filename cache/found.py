"""What a lookup in the store can return."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .codec import Scalar
from .compare import Differences, differences
from .entry import Entry
from .environment import Environment
from .layer import Layer

__all__ = ["MEMORY", "Hit", "Located", "Miss", "Nearest", "closest"]

#: Name of the pseudo layer that holds what could not be written.
MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Hit:
    """A usable entry.

    Attributes:
        entry: the entry.
        layer: name of the layer it came from (``memory`` if it could not be written).
        stale: losing backends that changed since; a new race could end differently.
        path: the file, or None in memory.
    """

    entry: Entry
    layer: str
    stale: tuple[str, ...] = ()
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Miss:
    """No usable entry, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Located:
    """An entry with its provenance. ``environment`` is None if the manifest is missing or damaged."""

    entry: Entry
    layer: Layer | None
    path: Path | None
    environment: Environment | None

    @property
    def layer_name(self) -> str:
        """The layer's name, ``memory`` if there is none."""
        return self.layer.name if self.layer else MEMORY


@dataclass(frozen=True, slots=True)
class Nearest:
    """The stored entry closest to a key that missed; ``differences`` is field -> (wanted, stored)."""

    located: Located
    differences: Differences


def closest(located: Iterable[Located], key: Mapping[str, Scalar]) -> Nearest | None:
    """The entry with the fewest key fields unlike ``key``; among equals the one whose numbers are closest, by
    ratio, then the first. None if there is none."""
    best: tuple[tuple[int, float], Nearest] | None = None
    for item in located:
        unlike = differences(key, item.entry.key)
        rank = (len(unlike), sum(_distance(*pair) for pair in unlike.values()))
        if best is None or rank < best[0]:
            best = (rank, Nearest(item, unlike))
    return best[1] if best else None


def _distance(wanted: object, stored: object) -> float:
    """How unlike two key values are: log2 of the ratio of two positive numbers, else a constant beyond."""
    if (
        isinstance(wanted, int | float)
        and isinstance(stored, int | float)
        and not isinstance(wanted, bool)
        and wanted > 0
        and stored > 0
    ):
        return abs(math.log2(wanted / stored))
    return 64.0
