"""Checking every file of a layer, with the very code that lookups read them with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .codec import InvalidRecordError
from .files import is_temporary, list_directory
from .layer import Layer

__all__ = ["Checked", "check_layer"]


@dataclass(frozen=True, slots=True)
class Checked:
    """One file (or directory) and what is wrong with it; "" if nothing."""

    path: Path
    problem: str


def check_layer(layer: Layer) -> Iterator[Checked]:
    """Check manifests, entries and strays. Unfinished writes are nobody's problem and not listed.

    Raises:
        OSError: a directory cannot be listed.
    """
    for name in layer.environments():
        yield _manifest(layer, name)
        entries = layer.schema_root / name / "entries"
        for folder in list_directory(entries):
            for path in list_directory(folder) if folder.is_dir() else (folder,):
                if not is_temporary(path):
                    yield _entry(layer, path)


def _manifest(layer: Layer, name: str) -> Checked:
    path = layer.manifest_path(name)
    try:
        return Checked(path, "" if layer.read_environment(name) else "missing")
    except (InvalidRecordError, OSError) as error:
        return Checked(path, str(error))


def _entry(layer: Layer, path: Path) -> Checked:
    try:
        layer.read_path(path)
    except (InvalidRecordError, OSError) as error:
        return Checked(path, str(error))
    return Checked(path, "")
