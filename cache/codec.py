"""One file format for everything the cache writes: canonical JSON in an envelope with schema and checksum.

    {"body": {...}, "checksum": "<sha256 of the canonical body>", "kind": "entry", "schema": 1}

Canonical means sorted keys, no spaces, ASCII, finite numbers only, so equal records are equal bytes and a
hash of the text is a hash of the content.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from ..errors import StoreError

__all__ = ["SCHEMA", "InvalidRecordError", "Scalar", "canonical", "digest", "parse", "seal", "unseal"]

#: Raised whenever the meaning of a stored field changes. Part of every path, so that two schemas can live
#: side by side and going back to an older isokern finds its own files untouched.
SCHEMA = 1

Scalar = int | float | bool | str

T = TypeVar("T")


class InvalidRecordError(StoreError, ValueError):
    """A record, or the file that should hold one, is not what it claims. The message says what is wrong."""


def canonical(value: Any) -> str:
    """The one JSON text of ``value``.

    Raises:
        InvalidRecordError: NaN, infinity, or something JSON has no word for.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRecordError(f"not storable as JSON: {error}") from error


def digest(value: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of ``value``'s canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def parse(text: str | bytes) -> Any:
    """Strict ``json.loads``.

    Raises:
        InvalidRecordError: not UTF-8, not JSON, nested without end, or with NaN or infinity in it.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(f"not valid JSON: {error}") from error


def seal(kind: str, body: Mapping[str, Any]) -> str:
    """The file text, one line, for ``body``."""
    return canonical({"schema": SCHEMA, "kind": kind, "checksum": digest(body, 64), "body": dict(body)}) + "\n"


def unseal(kind: str, text: str | bytes) -> dict[str, Any]:
    """The body of a file written by :func:`seal`.

    Raises:
        InvalidRecordError: truncated, altered, of another schema or of another kind.
    """
    envelope = parse(text)
    if not isinstance(envelope, dict):
        raise InvalidRecordError(f"expected a JSON object, found {type(envelope).__name__}")
    schema = read(envelope, "schema", int)
    if schema != SCHEMA:
        age = "newer" if schema > SCHEMA else "older"
        raise InvalidRecordError(f"schema {schema} is {age} than {SCHEMA}, the one this isokern reads")
    found = read(envelope, "kind", str)
    if found != kind:
        raise InvalidRecordError(f"expected kind {kind!r}, found {found!r}")
    body = read(envelope, "body", dict)
    if digest(body, 64) != read(envelope, "checksum", str):
        raise InvalidRecordError("checksum does not match the contents")
    return body


def read(record: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """``record[name]``, which must be exactly a ``kind``: a bool is no int, an int is no float.

    Raises:
        InvalidRecordError: missing, or of another type.
    """
    if name not in record:
        raise InvalidRecordError(f"field {name!r} is missing")
    value = record[name]
    if type(value) is not kind:
        raise InvalidRecordError(f"field {name!r}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def read_optional(record: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    """Like :func:`read`, where null is allowed (a missing field is not)."""
    if name in record and record[name] is None:
        return None
    return read(record, name, kind)


def number(name: str, value: Any) -> float:
    """``value`` as a finite float, from an int or a float.

    Raises:
        InvalidRecordError: anything else, NaN and infinity included.
    """
    if type(value) not in (int, float) or not _finite(value):
        raise InvalidRecordError(f"field {name!r}: expected a finite number, given {_shown(value)}")
    return float(value)


def _finite(value: float) -> bool:
    """Whether a float can hold it: JSON's integers have no end."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    return f"an integer of {value.bit_length()} bits" if type(value) is int and not _finite(value) else repr(value)


def check_scalars(name: str, values: Any) -> None:
    """Refuse anything but a mapping of strings to finite scalars (:data:`Scalar`)."""
    if not isinstance(values, Mapping):
        raise InvalidRecordError(f"field {name!r}: expected a mapping, given {type(values).__name__}")
    for key, value in values.items():
        if type(key) is not str:
            raise InvalidRecordError(f"field {name!r}: key {key!r} is not a string")
        if type(value) not in (int, float, bool, str) or (type(value) in (int, float) and not _finite(value)):
            raise InvalidRecordError(f"field {name!r}: {key}={_shown(value)} is not a finite scalar")
