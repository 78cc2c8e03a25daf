"""Kept: what the gate makes once per problem and uses for all its candidates.

Making a call up and computing its truth costs many times what running a kernel does. But candidates share the process
with what is kept, and a wrong one may write over it: so everything is sealed with a checksum, looked at before every
use, and made anew where the seal is broken, rather than held against the next candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Kept"]


class Keepable(Protocol):
    """What can be kept."""

    def lasting(self) -> Iterable[torch.Tensor]:
        """Its contiguous tensors whose contents no run may change."""

    def places(self) -> Hashable:
        """What else no run may change: where tensors lie whose contents it may."""


@dataclass(frozen=True, slots=True)
class _Sealed:
    thing: Any
    seal: tuple[Any, ...]
    bytes: int


class Kept:
    """Things by key, in so many bytes at most; what does not fit is made for each use.

    Attributes: ``made``, how often something was made; ``broken``, how often because its seal was; ``bytes``, held.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self.bytes = 0
        self._things: dict[Hashable, _Sealed] = {}
        self.made = 0
        self.broken = 0

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The thing kept under ``key`` as it was made, or a new one."""
        sealed = self._things.get(key)
        if sealed is not None:
            if _seal(sealed.thing) == sealed.seal:
                return sealed.thing
            self.broken += 1
            self._left += sealed.bytes
            self.bytes -= sealed.bytes
            del self._things[key]
        thing = make()
        self.made += 1
        size = sum(t.numel() * t.element_size() for t in thing.lasting())
        if size <= self._left:
            self._left -= size
            self.bytes += size
            self._things[key] = _Sealed(thing, _seal(thing), size)
        return thing


def _seal(thing: Keepable) -> tuple[Any, ...]:
    return thing.places(), tuple((t.data_ptr(), tuple(t.shape), _sum(t)) for t in thing.lasting())


def _sum(t: torch.Tensor) -> int:
    """Of the bits: no accident preserves it."""
    data = t.detach().view(-1).view(torch.uint8)
    words = data.numel() // 8 * 8
    return int(data[:words].view(torch.int64).sum()) + int(data[words:].sum(dtype=torch.int64))
