"""A plan: an immutable, content-hashed set of choices, so that all ranks of a job can prove they agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError
from .candidate import config_label
from .codec import InvalidRecordError, Scalar, canonical, check_scalars, digest, read, seal, unseal
from .compare import Differences, differences
from .entry import key_hash
from .environment import Environment
from .files import read_bytes, write_atomic
from .found import Hit
from .store import Store

__all__ = ["Choice", "Plan"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One key's backend and config, with the backend's fingerprint when it was measured."""

    op: str
    contract_version: int
    key: dict[str, Scalar]
    backend: str
    config: dict[str, Scalar]
    fingerprint: str

    @property
    def label(self) -> str:
        """``"backend[config]"``."""
        return f"{self.backend}[{config_label(self.config)}]"

    @property
    def key_hash(self) -> str:
        """See ``entry.key_hash``."""
        return key_hash(self.op, self.contract_version, self.key)

    def to_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "contract_version": self.contract_version,
            "key": dict(self.key),
            "backend": self.backend,
            "config": dict(self.config),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Choice:
        for name in ("key", "config"):
            check_scalars(name, record.get(name))
        return cls(
            op=read(record, "op", str),
            contract_version=read(record, "contract_version", int),
            key=read(record, "key", dict),
            backend=read(record, "backend", str),
            config=read(record, "config", dict),
            fingerprint=read(record, "fingerprint", str),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A set of choices for one environment.

    Attributes:
        environment: where they hold.
        choices: at most one per key, kept in a canonical order whatever order they were given in.
        content_hash: 16 hex digits over the environment's hash and the choices. Ranks compare it.

    Raises:
        PlanError: two choices for one key, or one that cannot be stored.
    """

    environment: Environment
    choices: tuple[Choice, ...]
    content_hash: str = field(init=False, compare=False)
    _by_key: dict[str, Choice] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        by_key: dict[str, Choice] = {}
        try:
            for choice in sorted(self.choices, key=lambda choice: canonical(choice.to_dict())):
                other = by_key.setdefault(choice.key_hash, choice)
                if other is not choice:
                    raise PlanError(f"two choices for one key of op {choice.op!r}: {other.label} and {choice.label}")
            contents = [self.environment.hash, [choice.to_dict() for choice in by_key.values()]]
            object.__setattr__(self, "content_hash", digest(contents))
        except InvalidRecordError as error:
            raise PlanError(f"a choice cannot be stored: {error}") from error
        object.__setattr__(self, "choices", tuple(by_key.values()))
        object.__setattr__(self, "_by_key", by_key)

    @classmethod
    def from_store(
        cls,
        store: Store,
        environment: Environment,
        fingerprints: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Plan:
        """Every choice that ``store.get`` would return in ``environment``.

        Args:
            fingerprints: op -> backend -> current fingerprint, as for ``Store.get``; ops not in it, or None,
                are not checked.
        """
        chosen: dict[str, Choice] = {}
        for located in store.entries(environment):
            seen = located.entry
            if seen.key_hash in chosen:
                continue
            current = None if fingerprints is None else fingerprints.get(seen.op)
            found = store.get(seen.op, seen.contract_version, seen.key, environment, current)
            if isinstance(found, Hit):
                entry = found.entry
                chosen[entry.key_hash] = Choice(
                    entry.op,
                    entry.contract_version,
                    dict(entry.key),
                    entry.backend,
                    dict(entry.config),
                    entry.chosen.fingerprint,
                )
        return cls(environment, tuple(chosen.values()))

    def lookup(self, op: str, contract_version: int, key: Mapping[str, Scalar]) -> Choice | None:
        """The choice for ``key``, or None."""
        return self._by_key.get(key_hash(op, contract_version, key))

    def check(self, environment: Environment) -> None:
        """Raise PlanError, naming each field that differs, if the plan was made for another environment."""
        unlike = self.environment.diff(environment)
        if unlike:
            fields = "; ".join(f"{name}: plan {mine!r}, here {here!r}" for name, (mine, here) in unlike.items())
            made_for, here = self.environment.describe(), environment.describe()
            what = f"for {made_for}, this is {here}" if made_for != here else "in another environment"
            raise PlanError(f"plan {self.content_hash} was made {what} ({fields})")

    def require(self, content_hash: str | None) -> None:
        """Raise PlanError if ``content_hash`` is given and not this plan's."""
        if content_hash is not None and content_hash != self.content_hash:
            raise PlanError(f"expected plan {content_hash}, given plan {self.content_hash}")

    def diff(self, other: Plan) -> Differences:
        """``{"environment.versions.torch": (mine, theirs), "<op>/<key hash>": (choice, choice), ...}``; empty if the
        two are the same plan."""
        found = {f"environment.{name}": pair for name, pair in self.environment.diff(other.environment).items()}
        return found | differences(self._summary(), other._summary())

    def _summary(self) -> dict[str, str]:
        return {f"{c.op}/{name}": f"{c.label} {c.fingerprint}" for name, c in self._by_key.items()}

    def save(self, path: Path | str) -> None:
        """Write the plan atomically.

        Raises:
            PlanError: the file cannot be written.
        """
        body = {
            "content_hash": self.content_hash,
            "environment": self.environment.to_dict(),
            "choices": [choice.to_dict() for choice in self.choices],
        }
        try:
            write_atomic(Path(path), seal("plan", body))
        except OSError as error:
            raise PlanError(f"cannot write plan {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path | str, environment: Environment | None = None) -> Plan:
        """Read a plan and verify its hash; with ``environment``, also that it was made for it.

        Raises:
            PlanError: missing, unreadable, altered, or (if asked) made for another environment.
        """
        try:
            data = read_bytes(Path(path))
            if data is None:
                raise PlanError(f"plan {path}: no such file")
            body = unseal("plan", data)
            choices = tuple(Choice.from_dict(choice) for choice in read(body, "choices", list))
            plan = cls(Environment.from_dict(read(body, "environment", dict)), choices)
            claimed = read(body, "content_hash", str)
        except OSError as error:
            raise PlanError(f"plan {path}: cannot be read: {error.strerror or error}") from error
        except InvalidRecordError as error:
            raise PlanError(f"plan {path}: {error}") from error
        if plan.content_hash != claimed:
            raise PlanError(f"plan {path}: content hash is {plan.content_hash}, the file claims {claimed}")
        if environment is not None:
            plan.check(environment)
        return plan
