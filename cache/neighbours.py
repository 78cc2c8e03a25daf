"""Neighbours: entries tuned for batches of about the same size, for problems that nothing was tuned for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from .codec import Scalar
from .compare import Differences, differences
from .found import Located

__all__ = ["FARTHEST", "Neighbour", "neighbours"]

#: Doublings beyond which a batch says nothing about another.
FARTHEST = 4.0
#: What another class of lengths, or a count that only one side knows, weighs in doublings.
_UNLIKE = 2.0
#: What a doubling of a count weighs; 1 if not named. The longest sequence decides how long a kernel that walks over
#: tokens takes; sequences and tokens share the rest (states moved, work done), and double together in decode.
_WEIGHTS = {"n": 0.5, "tokens": 0.5}


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry for a key that is like the wanted one in all but its sizes.

    Attributes:
        located: the entry. away: its distance, in doublings. differences: field -> (wanted, stored).
    """

    located: Located
    away: float
    differences: Differences


def neighbours(located: Iterable[Located], key: Mapping[str, Scalar], sizes: Collection[str]) -> list[Neighbour]:
    """The entries whose keys differ from ``key`` in ``sizes`` alone, closest first; of equals the first.

    Args:
        sizes: names of the key's fields that say how much there is. One token per sequence (``longest``) is near no
            other length: that is another kernel's work.
    """
    found: list[Neighbour] = []
    for item in located:
        unlike = differences(key, item.entry.key)
        if not set(unlike) <= set(sizes):
            continue
        away = sum(_doublings(name, *pair) for name, pair in unlike.items())
        if away <= FARTHEST:
            found.append(Neighbour(item, away, unlike))
    return sorted(found, key=lambda near: near.away)


def _doublings(name: str, wanted: object, stored: object) -> float:
    if isinstance(wanted, bool) or isinstance(stored, bool) or not (_count(wanted) and _count(stored)):
        return _UNLIKE
    assert isinstance(wanted, int)
    assert isinstance(stored, int)
    if name == "longest" and 1 in (wanted, stored):
        return math.inf
    return _WEIGHTS.get(name, 1.0) * abs(math.log2(wanted / stored))


def _count(value: object) -> bool:
    return isinstance(value, int) and value > 0
