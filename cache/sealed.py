"""A store whose choices no longer count, and why: what a registry looks tuned choices up in once ranks have agreed.

Files change under a running job: another process tunes, an administrator prunes, a package is updated. Two ranks that
read the same directory a minute apart would then choose differently. So ranks agree on what they have read, and read no
more; shipped tables that all of them have are kept as they were read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .codec import Scalar, digest
from .environment import Environment
from .found import Hit, Located, Miss
from .neighbours import Neighbour, neighbours
from .plan import Plan
from .shipped import SHIPPED, Table
from .store import Store

__all__ = ["ReadTables", "SealedStore"]


class ReadTables:
    """All shipped tables of a store, read now and never again.

    Attributes:
        content_hash: of the environments they were made in and of every entry; "" if there is no entry.
    """

    def __init__(self, store: Store, environment: Environment) -> None:
        tables = Store([layer for layer in store.layers if layer.name == SHIPPED])
        self._entries = {(x.entry.environment, x.entry.op, x.entry.key_hash): x for x in tables.entries()}
        self._tables = tables.tables(environment)
        found = self._entries.values()
        made_in = {x.entry.environment: x.environment.to_dict() for x in found if x.environment is not None}
        contents = [made_in, [[x.entry.environment, x.entry.to_json()] for x in found]]
        self.content_hash = digest(contents) if found else ""

    def tables(self) -> tuple[Table, ...]:
        """As ``Store.tables`` for the environment that they were read for."""
        return self._tables

    def entry(self, table: Table, op: str, name: str) -> Located | None:
        """The entry of this key hash."""
        return self._entries.get((table.environment.hash, op, name))

    def neighbours(
        self, table: Table, op: str, contract_version: int, key: Mapping[str, Scalar], sizes: Collection[str]
    ) -> list[Neighbour]:
        """As ``Store.neighbours_in_table``."""
        wanted = (table.environment.hash, op, contract_version)
        located = self._entries.values()
        entries = (x for x in located if (x.entry.environment, x.entry.op, x.entry.contract_version) == wanted)
        return neighbours(entries, key, sizes)


class SealedStore(Store):
    """``store`` for everything but lookups, which all miss. ``explain`` can still show what is in it.

    Args:
        store: what was consulted until now. plan: what was pinned then. reason: what every miss says.
        tables: the shipped tables that count still, if any.

    Attributes: ``store``, ``plan``, ``reason``.
    """

    def __init__(self, store: Store, plan: Plan | None, reason: str, tables: ReadTables | None = None) -> None:
        super().__init__(store.layers)
        self.store = store
        self.plan = plan
        self.reason = reason
        self._shipped = tables

    def get(
        self,
        op: str,
        contract_version: int,
        key: Mapping[str, Scalar],
        environment: Environment,
        fingerprints: Mapping[str, str] | None = None,
    ) -> Hit | Miss:
        """A miss, for the reason that the store was sealed."""
        return Miss(self.reason)

    def neighbours(
        self,
        op: str,
        contract_version: int,
        key: Mapping[str, Scalar],
        sizes: Collection[str],
        environment: Environment,
    ) -> list[Neighbour]:
        """None: what is near in one rank's store need not be in another's."""
        return []

    def tables(self, environment: Environment) -> tuple[Table, ...]:
        """Those that all ranks have, if they do: another may have another isokern's tables, or another GPU."""
        return () if self._shipped is None else self._shipped.tables()

    def in_table(self, table: Table, op: str, contract_version: int, key: Mapping[str, Scalar]) -> Located | None:
        """As it was when the ranks agreed."""
        name = self._key_hash(op, contract_version, key)
        return None if self._shipped is None or name is None else self._shipped.entry(table, op, name)

    def neighbours_in_table(
        self, table: Table, op: str, contract_version: int, key: Mapping[str, Scalar], sizes: Collection[str]
    ) -> list[Neighbour]:
        """As they were when the ranks agreed."""
        return [] if self._shipped is None else self._shipped.neighbours(table, op, contract_version, key, sizes)
