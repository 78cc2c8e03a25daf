"""A store whose choices no longer count, and why: what a registry looks tuned choices up in once ranks have agreed.

Files change under a running job: another process tunes, an administrator prunes. Two ranks that read the same
directory a minute apart would then choose differently. So ranks agree on what they have read, and read no more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .codec import Scalar
from .environment import Environment
from .found import Hit, Miss
from .neighbours import Neighbour
from .plan import Plan
from .shipped import Table
from .store import Store

__all__ = ["SealedStore"]


class SealedStore(Store):
    """``store`` for everything but lookups, which all miss. ``explain`` can still show what is in it.

    Args:
        store: what was consulted until now. plan: what was pinned then. reason: what every miss says.

    Attributes: ``store``, ``plan``, ``reason``.
    """

    def __init__(self, store: Store, plan: Plan | None, reason: str) -> None:
        super().__init__(store.layers)
        self.store = store
        self.plan = plan
        self.reason = reason

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
        """None: another rank may have another isokern's tables, or another GPU's."""
        return ()
