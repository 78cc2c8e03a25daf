"""Neighbours: tuned choices for batches of about the same size, for problems that nothing was tuned for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from .codec import Scalar
from .compare import differences
from .found import Located, Nearest

__all__ = ["FARTHEST", "neighbours"]

#: Doublings, summed over all counts, beyond which a batch says nothing about another.
FARTHEST = 6.0
#: What another class of lengths, or a count that only one side knows, weighs in doublings.
_UNLIKE = 2.0


def neighbours(located: Iterable[Located], key: Mapping[str, Scalar], sizes: Collection[str]) -> list[Nearest]:
    """The entries whose keys differ from ``key`` in ``sizes`` alone, closest first; of equals the first.

    Args:
        sizes: names of the key's fields that say how much there is. One token per sequence (``longest``) is near no
            other length: that is another kernel's work.
    """
    found: list[tuple[float, Nearest]] = []
    for item in located:
        unlike = differences(key, item.entry.key)
        if not set(unlike) <= set(sizes):
            continue
        away = sum(_doublings(name, *pair) for name, pair in unlike.items())
        if away <= FARTHEST:
            found.append((away, Nearest(item, unlike)))
    return [nearest for _, nearest in sorted(found, key=lambda pair: pair[0])]


def _doublings(name: str, wanted: object, stored: object) -> float:
    if isinstance(wanted, bool) or isinstance(stored, bool) or not (_count(wanted) and _count(stored)):
        return _UNLIKE
    assert isinstance(wanted, int)
    assert isinstance(stored, int)
    if name == "longest" and 1 in (wanted, stored):
        return math.inf
    return abs(math.log2(wanted / stored))


def _count(value: object) -> bool:
    return isinstance(value, int) and value > 0
