"""Per-field differences of two mappings: one implementation for environments, keys and whole entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ABSENT", "Differences", "differences"]

#: What a diff shows for a field that one side does not have.
ABSENT = "(absent)"

#: field name -> (first value, second value)
Differences = dict[str, tuple[Any, Any]]


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, names joined by dots; lists become tuples."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, list) else value
    return flat


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Differences:
    """The fields whose values differ, in order of name.

    ``1``, ``1.0`` and ``True`` are different values here, as they are in a stored key.
    """
    one, two = _flatten(first), _flatten(second)
    found: Differences = {}
    for name in sorted(one.keys() | two.keys()):
        left, right = one.get(name, ABSENT), two.get(name, ABSENT)
        if left != right or type(left) is not type(right):
            found[name] = (left, right)
    return found
