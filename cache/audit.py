"""Checking every file of a layer, with the very code that lookups read them with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .codec import InvalidRecordError
from .files import is_temporary, list_directory
from .layer import Layer

__all__ = ["Checked", "check_layer"]

#: What isokern makes in an environment's directory.
_OWN = ("entries", "journal", "manifest.json")


@dataclass(frozen=True, slots=True)
class Checked:
    """One file (or directory).

    Attributes:
        problem: what is wrong with it; "" if nothing.
        stray: it is none of the store's by its name, so that nothing reads it: a ``.DS_Store``, somebody's notes. No
            problem. What has a record's name (``.json``) among the entries claims to be one, and is held to that.
    """

    path: Path
    problem: str
    stray: bool = False


def check_layer(layer: Layer) -> Iterator[Checked]:
    """Check manifests and entries, and list strays. Unfinished writes and journals are nobody's problem and not listed.

    A manifest may be missing where there is no entry yet: a first warm-up begins with its journal.

    Raises:
        OSError: a directory cannot be listed.
    """
    for name in layer.environments():
        yield from _manifest(layer, name)
        home = layer.schema_root / name
        for path in list_directory(home):
            if path.name not in _OWN and not is_temporary(path):
                yield Checked(path, "", stray=True)
        for folder in list_directory(home / "entries"):
            for path in list_directory(folder) if folder.is_dir() else (folder,):
                if not is_temporary(path):
                    yield _entry(layer, path)


def _manifest(layer: Layer, name: str) -> Iterator[Checked]:
    path = layer.manifest_path(name)
    try:
        if layer.read_environment(name):
            yield Checked(path, "")
        elif any(layer.entry_paths(name)):
            yield Checked(path, "missing: what was tuned here cannot be moved until the next result writes it again")
    except (InvalidRecordError, OSError) as error:
        yield Checked(path, str(error))


def _entry(layer: Layer, path: Path) -> Checked:
    if path.suffix != ".json":
        return Checked(path, "", stray=True)
    try:
        layer.read_path(path)
    except (InvalidRecordError, OSError) as error:
        return Checked(path, str(error))
    return Checked(path, "")
