"""One directory of entries.

<root>/v<schema>/<environment hash>/manifest.json
<root>/v<schema>/<environment hash>/entries/<op>/<key hash>.json
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .codec import SCHEMA, InvalidRecordError, seal, unseal
from .entry import Entry
from .environment import Environment
from .files import is_temporary, list_directory, read_bytes, write_atomic

__all__ = ["Layer"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A root directory with a name; it need not exist.

    Attributes:
        name: ``explicit``, ``user``, ``site`` or ``shipped``.
        root: the directory above ``v<schema>``.
        writable: whether the store may write here. A read-only layer is never written, whatever its
            permissions.
    """

    name: str
    root: Path
    writable: bool = False

    @property
    def schema_root(self) -> Path:
        """The directory of this schema; other schemas' directories beside it are never touched."""
        return self.root / f"v{SCHEMA}"

    def manifest_path(self, environment: str) -> Path:
        """Where the manifest of the environment with this hash lies."""
        return self.schema_root / environment / "manifest.json"

    def entry_path(self, environment: str, op: str, key: str) -> Path:
        """Where an entry lies, by the hashes of its environment and key."""
        return self.schema_root / environment / "entries" / op / f"{key}.json"

    def read(self, environment: str, op: str, key: str) -> Entry | None:
        """The entry, or None if there is none.

        Raises:
            InvalidRecordError: the file is damaged, of another schema, or holds another entry than its name
            says. OSError: it cannot be read.
        """
        return self.read_path(self.entry_path(environment, op, key))

    def read_path(self, path: Path) -> Entry | None:
        """Like :meth:`read`, for a path of this layer as :meth:`entry_paths` yields it."""
        data = read_bytes(path)
        if data is None:
            return None
        entry = Entry.from_json(data)
        if self.entry_path(entry.environment, entry.op, entry.key_hash) != path:
            held = f"{entry.op}/{entry.key_hash} of environment {entry.environment}"
            raise InvalidRecordError(f"holds {held}, not what its path says")
        return entry

    def read_environment(self, environment: str) -> Environment | None:
        """The manifest of the environment with this hash, or None; raises as :meth:`read`."""
        data = read_bytes(self.manifest_path(environment))
        if data is None:
            return None
        found = Environment.from_dict(unseal("environment", data))
        if found.hash != environment:
            raise InvalidRecordError(f"describes environment {found.hash}, not what its path says")
        return found

    def write(self, entry: Entry, environment: Environment) -> Path:
        """Write ``entry``, and its environment's manifest if that is missing or damaged; the entry's path.

        Raises:
            OSError: read-only or full disk, ...
        """
        self._write_manifest(environment)
        path = self.entry_path(entry.environment, entry.op, entry.key_hash)
        write_atomic(path, entry.to_json())
        return path

    def _write_manifest(self, environment: Environment) -> None:
        try:
            if self.read_environment(environment.hash) is not None:
                return
        except InvalidRecordError:
            pass  # damaged: the replacement below is the repair
        write_atomic(self.manifest_path(environment.hash), seal("environment", environment.to_dict()))

    def environments(self) -> Iterator[str]:
        """Hashes of the environments with a directory here; raises OSError."""
        return (path.name for path in list_directory(self.schema_root) if path.is_dir())

    def entry_paths(self, environment: str) -> Iterator[Path]:
        """Entry files of one environment, in order of op and key hash; raises OSError."""
        for op in list_directory(self.schema_root / environment / "entries"):
            for path in list_directory(op):
                if path.suffix == ".json":
                    yield path

    def temporaries(self) -> Iterator[Path]:
        """Unfinished writes anywhere in this schema; raises OSError."""
        for environment in self.environments():
            directory = self.schema_root / environment
            for folder in (directory, *list_directory(directory / "entries")):
                yield from (path for path in list_directory(folder) if is_temporary(path))
