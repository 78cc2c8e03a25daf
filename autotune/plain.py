"""Nested frozen records of scalars, tuples and records, as JSON types and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

__all__ = ["from_plain"]

T = TypeVar("T")


def from_plain(kind: type[T], record: Mapping[str, Any]) -> T:
    """The inverse of ``dataclasses.asdict`` for a record whose fields are scalars, tuples of scalars, or records.

    Raises:
        TypeError: ``record`` has other fields than ``kind``. Whatever the record's own checks raise.
    """
    hints = get_type_hints(kind)
    unknown = record.keys() - {f.name for f in fields(kind)}  # type: ignore[arg-type]  # T is a dataclass
    if unknown:
        raise TypeError(f"{kind.__name__} has no fields {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {}
    for name, value in record.items():
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            values[name] = from_plain(hint, value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
