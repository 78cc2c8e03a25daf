"""Reading a TOML table strictly: wrong types, missing and unknown keys name the table and the key."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar, cast

from ....errors import CatalogueError, near_matches

__all__ = ["StrictTable"]

_E = TypeVar("_E", bound=StrEnum)


class StrictTable:
    """One TOML table while it is read: every key is taken once, what is left over is unknown.

    Every method raises :class:`CatalogueError`, as ``file: [table] key: what is wrong``.
    """

    _MISSING: Any = object()

    def __init__(self, source: str, where: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.where = where
        self._left = dict(values)
        self._taken: list[str] = []

    def invalid(self, key: str, expected: str, given: object) -> CatalogueError:
        return CatalogueError(f"{self.source}: [{self.where}] {key}: expected {expected}, given {given!r}")

    def has(self, key: str) -> bool:
        self._taken.append(key)  # known, whether it is there or not
        return key in self._left

    def take(self, key: str, kind: type[Any], default: Any = _MISSING) -> Any:
        """The value of ``key``, which must be exactly of type ``kind`` (an int is also taken as a float)."""
        self._taken.append(key)
        if key not in self._left:
            if default is not self._MISSING:
                return default
            near = near_matches(key, self._left)
            hint = f" (is {near[0]!r} meant for it?)" if near else ""
            raise CatalogueError(f"{self.source}: [{self.where}] {key}: missing{hint}")
        value = self._left.pop(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:  # exactly: TOML's true is no integer
            raise self.invalid(key, f"a value of type {kind.__name__}", value)
        return value

    def positive(self, key: str) -> int:
        value = cast(int, self.take(key, int))
        if value < 1:
            raise self.invalid(key, "an integer of one or more", value)
        return value

    def text(self, key: str) -> str:
        value = cast(str, self.take(key, str))
        if not value.strip():
            raise self.invalid(key, "some text", value)
        return value

    def list_of(self, key: str, kind: type[Any], default: Any = _MISSING) -> tuple[Any, ...]:
        value = self.take(key, list, None if default is not self._MISSING else self._MISSING)
        if value is None:
            return cast(tuple[Any, ...], default)
        if any(type(item) is not kind for item in value):
            raise self.invalid(key, f"a list of {kind.__name__}", value)
        return tuple(value)

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.invalid(key, f"one of {', '.join(allowed)}", value)
        return value

    def choice(self, key: str, enum: type[_E]) -> _E:
        return enum(self.one_of(key, tuple(str(member) for member in enum)))

    def some_of(self, key: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        """An optional list of names among ``allowed``; empty if the key is absent."""
        value = self.list_of(key, str, ())
        if not set(value) <= set(allowed):
            raise self.invalid(key, f"names among {', '.join(allowed)}", value)
        return value

    def finish(self) -> None:
        """Call when all known keys are taken."""
        for key in self._left:
            near = near_matches(key, self._taken)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CatalogueError(f"{self.source}: [{self.where}] {key}: unknown key{hint}")
