"""Making the shipped layer from a store: what is current, nothing of the machine but its silicon, one entry a key.

The same store and the same folder always give the same bytes, so that a table in version control changes only where a
measurement did.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import StoreError
from .audit import check_layer
from .codec import canonical, seal
from .entry import Entry
from .environment import Environment
from .extract import extract, without_strangers
from .files import read_bytes, write_atomic
from .layer import Layer
from .prune import Removal, remove
from .shipped import is_current
from .transfer import Parcel

__all__ = ["Current", "CurrentOf", "Shipped", "UnshippableError", "ship"]

#: What a version says that nobody else can install.
_UNKNOWN = re.compile(r"unknown|dirty", re.IGNORECASE)
#: The only label that says nothing about one machine.
_LABELS = frozenset({"product"})


class UnshippableError(StoreError):
    """A store that no table may be made of: damaged, or of an environment that nobody could recognise."""


@dataclass(frozen=True, slots=True)
class Current:
    """An op as it is now: contract version, and of each backend the fingerprint, whole and of its source alone."""

    contract_version: int
    fingerprints: Mapping[str, str]
    sources: Mapping[str, str]


#: The op of this name, or None if it is not registered here.
CurrentOf = Callable[[str], Current | None]


@dataclass(slots=True)
class Shipped:
    """What :func:`ship` did.

    Attributes:
        added, replaced, kept: keys that were not there, that have a newer measurement now, that are as they were.
        removed: entries that were there and no longer count, or were measured again on the same silicon with other
            libraries.
        left_out: why entries of the store were not taken, with how many.
        bytes: of all files that the folder now has.
    """

    added: int = 0
    replaced: int = 0
    kept: int = 0
    removed: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def entries(self) -> int:
        """How many the folder now has."""
        return self.added + self.replaced + self.kept


def ship(source: Layer, out: Layer, current_of: CurrentOf, environment: str = "") -> Shipped:
    """Make shipped tables of ``source`` in ``out``, beside what is there; of one silicon's key the newer measurement
    stays. What is there and no longer current goes.

    Args: environment: only of environments whose hash begins so.

    Raises:
        UnshippableError: a file of either is damaged; or an environment has no manifest, a driver that is not known, or
            a version (isokern's own included) that is not known or not of a clean tree.
        StoreError: there is nothing to ship, or ``out`` cannot be written.
    """
    done = Shipped()
    try:
        offered = _taken(_parcels(source, environment), current_of, done.left_out)
        present = _parcels(out, "")
        if not offered:
            why = "; ".join(f"{count} {reason}" for reason, count in sorted(done.left_out.items())) or "it has none"
            raise StoreError(f"{source.root}: no entry to ship: {why}")
        _write(out, present, _newest([*_taken(present, current_of, Counter()), *offered]), done)
    except OSError as error:
        raise StoreError(f"{error.filename or out.root}: {error.strerror or error}") from error
    return done


# ---- reading


def _parcels(layer: Layer, prefix: str) -> list[Parcel]:
    """All entries of the layer, in order of environment, op and key."""
    found: list[Parcel] = []
    wanted = [name for name in layer.environments() if name.startswith(prefix) and any(layer.entry_paths(name))]
    for checked in check_layer(layer):
        if checked.problem and checked.path.relative_to(layer.schema_root).parts[0] in wanted:
            raise UnshippableError(f"{checked.path}: {checked.problem}")
    for name in wanted:
        environment = layer.read_environment(name)
        entries = [entry for path in layer.entry_paths(name) if (entry := layer.read_path(path)) is not None]
        if environment is None:
            raise UnshippableError(f"{layer.manifest_path(name)}: missing")
        _require_known(environment, entries, layer.manifest_path(name))
        found += [(entry, environment) for entry in entries]
    return found


def _require_known(environment: Environment, entries: Iterable[Entry], where: Path) -> None:
    versions = {"torch": "", **dict(environment.versions), "python": environment.python}
    if environment.device == "cuda":
        versions["driver"] = environment.driver
    facts = {*versions.items(), *(("isokern", entry.measured["isokern"]) for entry in entries)}
    for name, version in sorted(facts):
        if not version or _UNKNOWN.search(version):
            raise UnshippableError(f"{where}: nobody can tell what it was made with: {name} {version or 'unknown'}")


def _taken(parcels: Iterable[Parcel], current_of: CurrentOf, left_out: Counter[str]) -> list[Parcel]:
    """What is current of them, shortened, in environments without what names a machine."""
    found = []
    for entry, environment in parcels:
        current = current_of(entry.op)
        if current is None:
            left_out[f"of op {entry.op!r}, which is not registered"] += 1
        elif entry.contract_version != current.contract_version:
            left_out[f"of another version of the contract of {entry.op!r}"] += 1
        elif not is_current(entry.chosen, current.fingerprints, current.sources):
            left_out[f"whose choice {entry.backend!r} has changed since, or is not registered"] += 1
        else:
            rows = tuple(
                dataclasses.replace(c, source=current.sources[c.backend])
                for c in entry.candidates
                if is_current(c, current.fingerprints, current.sources)
            )
            labels = tuple(pair for pair in environment.labels if pair[0] in _LABELS)
            made_in = dataclasses.replace(environment, labels=labels)
            found.append((extract(dataclasses.replace(entry, candidates=rows)), made_in))
    return found


def _newest(parcels: Iterable[Parcel]) -> list[Parcel]:
    """One a key and silicon (and threads, on a CPU): the newest measurement, whatever libraries it was made with."""
    best: dict[str, tuple[tuple[float, str], Parcel]] = {}
    for entry, environment in parcels:
        machine = environment.to_dict()
        identity = canonical([machine["device"], machine["silicon"], environment.threads, entry.op, entry.key_hash])
        order = (entry.created.timestamp(), entry.to_json())  # the text decides between equals, in any order of reading
        if identity not in best or order > best[identity][0]:
            best[identity] = (order, (entry, environment))
    kept = [parcel for _, (_, parcel) in sorted(best.items())]
    found: list[Parcel] = []
    for op in sorted({entry.op for entry, _ in kept}):
        entries, environments = zip(*(parcel for parcel in kept if parcel[0].op == op), strict=True)
        found += zip(without_strangers(entries), environments, strict=True)
    return found


# ---- writing


def _write(out: Layer, present: Iterable[Parcel], parcels: Iterable[Parcel], done: Shipped) -> None:
    texts: dict[Path, str] = {}
    entries: set[Path] = set()
    for entry, environment in parcels:
        path = out.entry_path(entry.environment, entry.op, entry.key_hash)
        texts[path] = entry.to_json()
        texts[out.manifest_path(environment.hash)] = seal("environment", environment.to_dict())
        entries.add(path)
    before = {out.entry_path(entry.environment, entry.op, entry.key_hash) for entry, _ in present}
    homes = {out.manifest_path(name) for name in out.environments()}
    for path, text in sorted(texts.items()):
        data = text.encode()
        same = read_bytes(path) == data
        if not same:
            write_atomic(path, text)
        if path in entries:
            done.kept += same
            done.replaced += not same and path in before
            done.added += path not in before
        done.bytes += len(data)
    gone = sorted((before | homes) - texts.keys(), key=lambda path: (path in homes, path))  # manifests last
    done.removed += len(before - texts.keys())
    remove([Removal(path, "no longer shipped") for path in gone])
