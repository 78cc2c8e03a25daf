"""What may be removed from a store, and why. Finding and removing are apart: a dry run is the same code."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from .audit import check_layer
from .codec import InvalidRecordError
from .entry import Entry
from .environment import Environment
from .files import list_directory
from .layer import Layer

__all__ = ["Criteria", "Removal", "find_removals", "remove"]

#: Seconds after which an unfinished write can only be that of a dead process.
_ABANDONED_AFTER = 3600.0

#: backend -> current fingerprint for an op; None if the op is not registered here
FingerprintsOf = Callable[[str], Mapping[str, str] | None]


@dataclass(frozen=True, slots=True)
class Removal:
    """A file that may go, and why."""

    path: Path
    why: str


@dataclass(frozen=True, slots=True)
class Criteria:
    """What to remove beside abandoned temporary files. Each field is off by default.

    Attributes:
        keep_environments: remove other environments. One is kept if it differs from any of these in
            ``threads`` alone, and if none of these has its device: a host without a GPU cannot judge what was
            tuned on one.
        fingerprints_of: remove entries whose chosen backend has changed. One that is merely not registered
            stays: its package may only be missing today.
        older_than: remove entries measured longer ago.
        invalid: remove what :func:`.audit.check_layer` complains about, except that a manifest is missing (the entries
            beside it are still used where they were tuned) or that a file may not be read.
    """

    keep_environments: Sequence[Environment] | None = None
    fingerprints_of: FingerprintsOf | None = None
    older_than: timedelta | None = None
    invalid: bool = False


def find_removals(layer: Layer, criteria: Criteria) -> Iterator[Removal]:
    """Files of ``layer`` that meet any of ``criteria``; raises OSError if it cannot be listed."""
    for path in layer.temporaries():
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                yield Removal(path, "abandoned temporary file")
    # Once each, and for the reason that takes a whole environment along first.
    found = {removal.path: removal for removal in _invalid(layer, criteria)}
    for name in layer.environments():
        found |= {removal.path: removal for removal in _in_environment(layer, name, criteria)}
    yield from found.values()


def _invalid(layer: Layer, criteria: Criteria) -> Iterator[Removal]:
    for checked in check_layer(layer) if criteria.invalid else ():
        # Neither what is missing can be removed, nor is what may not be read known to be worthless.
        if checked.problem and os.access(checked.path, os.R_OK):
            yield Removal(checked.path, f"invalid: {checked.problem}")


def _in_environment(layer: Layer, name: str, criteria: Criteria) -> Iterator[Removal]:
    manifest = layer.manifest_path(name)
    try:
        environment = layer.read_environment(name)
    except (InvalidRecordError, OSError):  # what it is of cannot be told; that it is invalid is said elsewhere
        environment = None
    if environment and criteria.keep_environments is not None:
        unlike = _unlike_all(environment, criteria.keep_environments)
        if unlike:
            # the manifest last: interrupted halfway, the rest is still recognised next time
            for path in (*layer.entry_paths(name), *_journals(manifest), manifest):
                yield Removal(path, f"other environment ({unlike})")
            return
    for path in layer.entry_paths(name):
        try:
            entry = layer.read_path(path)
        except (InvalidRecordError, OSError):  # when it was measured cannot be told, either
            continue
        why = _outdated(entry, criteria) if entry else ""
        if why:
            yield Removal(path, why)


def _journals(manifest: Path) -> Iterator[Path]:
    """What interrupted runs in ``manifest``'s environment would go on from."""
    return (path for path in list_directory(manifest.with_name("journal")) if path.suffix == ".jsonl")


def _unlike_all(environment: Environment, kept: Sequence[Environment]) -> str:
    """The fields in which ``environment`` differs from the closest of ``kept``; "" if it is to be kept."""
    comparable = [other for other in kept if other.device == environment.device]
    unlike = [[name for name in environment.diff(other) if name != "threads"] for other in comparable]
    return ", ".join(sorted(unlike, key=len)[0]) if unlike else ""


def _outdated(entry: Entry, criteria: Criteria) -> str:
    if criteria.fingerprints_of is not None:
        current = (criteria.fingerprints_of(entry.op) or {}).get(entry.backend)
        if current is not None and current != entry.chosen.fingerprint:
            return f"stale: backend {entry.backend!r} has changed"
    if criteria.older_than is not None and datetime.now(UTC) - entry.created > criteria.older_than:
        return f"measured {entry.created:%Y-%m-%d}"
    return ""


def remove(removals: Sequence[Removal]) -> None:
    """Remove the files, then directories left empty, up to the environment's own.

    Raises:
        OSError: a file cannot be removed, or is a directory with something in it. One that is already gone is fine.
    """
    for removal in removals:
        if removal.path.is_dir() and not removal.path.is_symlink():
            removal.path.rmdir()
        else:
            removal.path.unlink(missing_ok=True)
    for folder in sorted({folder for removal in removals for folder in _folders(removal.path)}, reverse=True):
        with contextlib.suppress(OSError):  # not empty, or a network file system that is not done yet
            folder.rmdir()


def _folders(path: Path) -> tuple[Path, ...]:
    if path.parent.parent.name == "entries":  # .../<environment>/entries/<op>/<file>
        return path.parents[0], path.parents[1], path.parents[2]
    if path.parent.name in ("entries", "journal"):  # .../<environment>/journal/<file>
        return path.parents[0], path.parents[1]
    return (path.parent,)
