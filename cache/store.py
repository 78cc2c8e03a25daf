"""The tuning store: layers searched in order, one that is written, and memory for when it cannot be."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import platformdirs

from ..errors import StoreError
from .codec import InvalidRecordError, Scalar
from .entry import Entry, key_hash
from .environment import Environment
from .found import MEMORY, Hit, Located, Miss, Nearest, closest
from .layer import Layer
from .neighbours import Neighbour, neighbours
from .shipped import SHIPPED, Table, by_nearness

__all__ = ["CacheWarning", "Store"]

T = TypeVar("T")


class CacheWarning(UserWarning):
    """A store file is unusable, or the store cannot be written: choices may be slower, never wrong."""


class Store:
    """Entries of several layers; the first layer that has a usable one wins.

    Lookups never raise: whatever is wrong with a file is a miss and one :class:`CacheWarning`. Their
    outcomes, misses too, are remembered by this object until :meth:`refresh`, so that other processes' writes
    appear only then, and a miss costs no file access twice.

    Args:
        layers: in order of precedence. The first writable one takes all writes.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.writable_layer = next((layer for layer in self.layers if layer.writable), None)
        self._read: dict[Path, Entry | None] = {}
        self._environments: dict[tuple[Layer, str], Environment | None] = {}
        self._tables: dict[str, tuple[Table, ...]] = {}
        self._memory: dict[tuple[str, str, str], tuple[Entry, Environment]] = {}
        self._warned: set[tuple[str, ...]] = set()

    @classmethod
    def default(cls, root: Path | str | None = None) -> Store:
        """The store of this user: explicit root > user > site > shipped with isokern.

        Args:
            root: explicit root. If None, the environment variable ISOKERN_CACHE, read now and not again.

        ISOKERN_SITE_CACHE replaces the system's site data directory; neither is ever written.
        """
        explicit = root or os.environ.get("ISOKERN_CACHE")
        site = os.environ.get("ISOKERN_SITE_CACHE") or platformdirs.site_data_dir("isokern", appauthor=False)
        user = platformdirs.user_cache_dir("isokern", appauthor=False)
        layers = [Layer("explicit", _absolute(explicit), writable=True)] if explicit else []
        layers += [
            Layer("user", _absolute(user), writable=True),
            Layer("site", _absolute(site)),
            Layer(SHIPPED, Path(__file__).parent / "tables"),
        ]
        return cls(layers)

    def get(
        self,
        op: str,
        contract_version: int,
        key: Mapping[str, Scalar],
        environment: Environment,
        fingerprints: Mapping[str, str] | None = None,
    ) -> Hit | Miss:
        """Look ``key`` up.

        Args:
            op: op name.
            contract_version: version of the op's contract; an entry of another one is another entry.
            key: flat mapping of scalars, the measurement policy included.
            environment: where the choice is to be used.
            fingerprints: current fingerprint of each registered backend. None skips the check.

        Returns:
            A hit if the chosen backend still has the fingerprint it was measured with.
        """
        refused = []
        for found in self._candidates(op, contract_version, key, environment):
            entry = found.entry
            if fingerprints is None:
                return Hit(entry, found.layer_name, (), found.path)
            current = fingerprints.get(entry.backend)
            if current == entry.chosen.fingerprint:
                return Hit(entry, found.layer_name, entry.stale_backends(fingerprints), found.path)
            what = "is no longer registered" if current is None else "has changed since it was measured"
            refused.append(f"{found.layer_name}: the chosen backend {entry.backend!r} {what}")
        return Miss("; ".join(refused) or f"no entry in {', '.join([MEMORY, *self._names()])}")

    def peek(self, op: str, contract_version: int, key: Mapping[str, Scalar], environment: Environment) -> Entry | None:
        """The entry whatever its fingerprints, for a re-tune that reuses ``entry.fresh_candidates(...)``."""
        found = next(self._candidates(op, contract_version, key, environment), None)
        return found.entry if found else None

    def put(self, entry: Entry, environment: Environment) -> Path | None:
        """Store ``entry``; its path, or None if it could only be kept in memory (warned about once).

        Raises:
            StoreError: ``entry`` was made for another environment.
        """
        if entry.environment != environment.hash:
            raise StoreError(f"entry is of environment {entry.environment}, not {environment.hash}")
        identity = (environment.hash, entry.op, entry.key_hash)
        try:
            if self.writable_layer is None:
                raise PermissionError("the store has no writable layer")
            path = self.writable_layer.write(entry, environment)
        except OSError as error:
            self._memory[identity] = (entry, environment)
            self._warn_once(("write",), f"cannot write the store ({error}); new entries last as long as this process")
            return None
        self._memory.pop(identity, None)
        self._read[path] = entry
        return path

    def refresh(self) -> None:
        """Forget remembered lookups, so that others' writes are seen. Keeps what is only in memory."""
        self._read.clear()
        self._environments.clear()
        self._tables.clear()

    def entries(self, environment: Environment | None = None) -> Iterator[Located]:
        """All valid entries, layer by layer, of one environment or of all; shadowed ones too.

        Within a layer the order is that of environment hash, op and key hash.
        """
        wanted = None if environment is None else environment.hash
        for entry, made_in in list(self._memory.values()):
            if wanted in (None, entry.environment):
                yield Located(entry, None, None, made_in)
        for layer in self.layers:
            hashes = self._guarded(layer.schema_root, functools.partial(_listed, layer))
            for name in hashes or ():
                if wanted in (None, name):
                    yield from self._entries_in(layer, name)

    def neighbours(
        self,
        op: str,
        contract_version: int,
        key: Mapping[str, Scalar],
        sizes: Collection[str],
        environment: Environment,
    ) -> list[Neighbour]:
        """Entries for problems that differ in ``sizes`` alone, closest first; see :mod:`.neighbours`."""
        wanted = (op, contract_version)
        located = (x for x in self.entries(environment) if (x.entry.op, x.entry.contract_version) == wanted)
        return neighbours(located, key, sizes)

    def tables(self, environment: Environment) -> tuple[Table, ...]:
        """The shipped tables that say something about ``environment``, nearest first; see :func:`.by_nearness`.

        Those of the same silicon are among them, and that of ``environment`` itself. A table without a readable
        manifest is none: nobody could say what it was made on.
        """
        if environment.hash not in self._tables:
            found: list[Table] = []
            for layer in self.layers:
                if layer.name == SHIPPED:
                    hashes = self._guarded(layer.schema_root, functools.partial(_listed, layer)) or ()
                    made_in = [self._environment(layer, name) for name in hashes]
                    found += [Table(layer, there) for there in made_in if there is not None]
            self._tables[environment.hash] = by_nearness(found, environment)
        return self._tables[environment.hash]

    def in_table(self, table: Table, op: str, contract_version: int, key: Mapping[str, Scalar]) -> Located | None:
        """The entry for exactly ``key`` in a shipped table, whatever its fingerprints."""
        name = self._key_hash(op, contract_version, key)
        if name is None:
            return None
        path = table.layer.entry_path(table.environment.hash, op, name)
        entry = self._load(table.layer, path)
        return Located(entry, table.layer, path, table.environment) if entry else None

    def neighbours_in_table(
        self, table: Table, op: str, contract_version: int, key: Mapping[str, Scalar], sizes: Collection[str]
    ) -> list[Neighbour]:
        """As :meth:`neighbours`, in a shipped table."""
        wanted = (op, contract_version)
        entries = self._entries_in(table.layer, table.environment.hash)
        return neighbours((x for x in entries if (x.entry.op, x.entry.contract_version) == wanted), key, sizes)

    def nearest(self, op: str, key: Mapping[str, Scalar], environment: Environment | None = None) -> Nearest | None:
        """The entry of ``op`` with the fewest key fields unlike ``key``; among equals the one whose numbers
        are closest (by ratio), then the first in :meth:`entries`. None if the op has no entry."""
        return closest((found for found in self.entries(environment) if found.entry.op == op), key)

    def _names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def _candidates(
        self, op: str, contract_version: int, key: Mapping[str, Scalar], environment: Environment
    ) -> Iterator[Located]:
        """Valid entries of exactly this key, in order of precedence."""
        name = self._key_hash(op, contract_version, key)
        if name is None:
            return
        kept = self._memory.get((environment.hash, op, name))
        if kept:
            yield Located(kept[0], None, None, environment)
        for layer in self.layers:
            path = layer.entry_path(environment.hash, op, name)
            entry = self._load(layer, path)
            if entry:
                yield Located(entry, layer, path, environment)

    def _key_hash(self, op: str, contract_version: int, key: Mapping[str, Scalar]) -> str | None:
        try:
            return key_hash(op, contract_version, key)
        except InvalidRecordError as error:  # a NaN scale, say: no such key can ever have been stored
            self._warn_once(("key", op), f"cannot look up a key of op {op!r}: {error}")
            return None

    def _entries_in(self, layer: Layer, environment: str) -> Iterator[Located]:
        where = layer.schema_root / environment
        for path in self._guarded(where, lambda: list(layer.entry_paths(environment))) or ():
            entry = self._load(layer, path)
            if entry:
                yield Located(entry, layer, path, self._environment(layer, environment))

    def _load(self, layer: Layer, path: Path) -> Entry | None:
        if path not in self._read:
            self._read[path] = self._guarded(path, lambda: layer.read_path(path))
        return self._read[path]

    def _environment(self, layer: Layer, name: str) -> Environment | None:
        if (layer, name) not in self._environments:
            self._environments[layer, name] = self._guarded(
                layer.manifest_path(name), lambda: layer.read_environment(name)
            )
        return self._environments[layer, name]

    def _guarded(self, path: Path, action: Callable[[], T]) -> T | None:
        """``action()``, or None and one warning if what is on disk is unusable."""
        try:
            return action()
        except InvalidRecordError as error:
            self._warn_once(("invalid", str(path)), f"ignoring {path}: {error}")
        except OSError as error:
            self._warn_once(("unreadable", str(path)), f"cannot read {path}: {error.strerror or error}")
        return None

    def _warn_once(self, what: tuple[str, ...], message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, CacheWarning, stacklevel=4)


def _listed(layer: Layer) -> list[str]:
    return list(layer.environments())


def _absolute(path: Path | str) -> Path:
    return Path(path).expanduser().absolute()
