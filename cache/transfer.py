"""Moving entries between stores: bundles (one file) and merging, where a key's newer measurement wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .codec import InvalidRecordError, read, seal, unseal
from .entry import Entry
from .environment import Environment
from .files import read_bytes, write_atomic
from .found import Located
from .layer import Layer

__all__ = ["Absorbed", "Parcel", "absorb", "load_bundle", "movable", "pack", "save_bundle", "unpack"]

#: An entry with the environment it holds for.
Parcel = tuple[Entry, Environment]


@dataclass(frozen=True, slots=True)
class Absorbed:
    """What :func:`absorb` did: keys added, replaced by a newer entry, kept because theirs was as new."""

    added: int
    replaced: int
    kept: int


def movable(located: Iterable[Located]) -> tuple[list[Parcel], int]:
    """The entries that can leave their store, first per environment and key, and how many cannot.

    An entry whose manifest is missing or damaged cannot: nobody could say what its environment was.
    """
    found: dict[tuple[str, str], Parcel] = {}
    homeless = 0
    for item in located:
        if item.environment is None:
            homeless += 1
        else:
            found.setdefault((item.entry.environment, item.entry.key_hash), (item.entry, item.environment))
    return list(found.values()), homeless


def absorb(layer: Layer, parcels: Sequence[Parcel]) -> Absorbed:
    """Write ``parcels`` into ``layer``, except where it has an entry measured at the same time or later.

    Raises:
        StoreError: the layer cannot be written. What was written before stays, complete and valid.
    """
    added = replaced = kept = 0
    for entry, environment in parcels:
        try:
            try:
                present = layer.read(entry.environment, entry.op, entry.key_hash)
                damaged = False
            except InvalidRecordError:
                present, damaged = None, True
            if present is not None and present.created >= entry.created:
                kept += 1
                continue
            layer.write(entry, environment)
        except OSError as error:
            raise StoreError(f"cannot write {layer.root}: {error.strerror or error}") from error
        if present is None and not damaged:
            added += 1
        else:
            replaced += 1
    return Absorbed(added, replaced, kept)


def pack(parcels: Sequence[Parcel]) -> str:
    """``parcels`` and their environments as the text of one file."""
    body = {
        "environments": {environment.hash: environment.to_dict() for _, environment in parcels},
        "entries": [entry.to_dict() for entry, _ in parcels],
    }
    return seal("bundle", body)


def unpack(text: str | bytes, source: str) -> list[Parcel]:
    """Validate all of a bundle before anything is done with it; ``source`` is who sent it, for messages.

    Raises:
        StoreError: damaged, of another schema, or any entry in it invalid.
    """
    try:
        body = unseal("bundle", text)
        environments = {name: _environment(name, record) for name, record in read(body, "environments", dict).items()}
        records = read(body, "entries", list)
    except InvalidRecordError as error:
        raise StoreError(f"{source}: {error}") from error
    parcels = []
    for number, record in enumerate(records):
        try:
            entry = Entry.from_dict(record if isinstance(record, dict) else {})
            if entry.environment not in environments:
                raise InvalidRecordError(f"its environment {entry.environment} is not in the bundle")
        except InvalidRecordError as error:
            raise StoreError(f"{source}: entry {number}: {error}") from error
        parcels.append((entry, environments[entry.environment]))
    return parcels


def save_bundle(path: Path, parcels: Sequence[Parcel]) -> None:
    """Write ``parcels`` and their environments as one file; raises StoreError if it cannot be written."""
    try:
        write_atomic(path, pack(parcels))
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def load_bundle(path: Path) -> list[Parcel]:
    """Read a file written by :func:`save_bundle`; raises StoreError if it is missing, and as :func:`unpack`."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    if data is None:
        raise StoreError(f"{path}: no such file")
    return unpack(data, str(path))


def _environment(name: str, record: Any) -> Environment:
    environment = Environment.from_dict(record if isinstance(record, dict) else {})
    if environment.hash != name:
        raise InvalidRecordError(f"environment {name} hashes to {environment.hash}")
    return environment
