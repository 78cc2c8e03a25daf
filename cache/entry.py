"""A stored choice: what won for one key, by what margin, against whom, and what was wrong with the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypedDict

from .candidate import CandidateRecord, config_label
from .codec import (
    InvalidRecordError,
    Scalar,
    canonical,
    check_scalars,
    digest,
    number,
    read,
    seal,
    unseal,
)

__all__ = ["Entry", "Measured", "key_hash"]

# Both become path components, so nothing but plain names may pass, from an imported file least of all.
_OP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_HASH = re.compile(r"[0-9a-f]{16}")

_POLICIES = ("eager", "graph")


class Measured(TypedDict):
    """How an entry came about.

    ``policy``: ``eager`` or ``graph``; ``method``: the timer, in words; ``launches``: kernel launches timed
    over all candidates; ``seconds``: wall time spent on this key; ``created``: ISO 8601 date and time (UTC if
    it names no zone); ``isokern``: version that measured.
    """

    policy: str
    method: str
    launches: int
    seconds: float
    created: str
    isokern: str


def key_hash(op: str, contract_version: int, key: Mapping[str, Scalar]) -> str:
    """16 hex digits that name the entry of ``key``; the order of its fields does not matter.

    Raises:
        InvalidRecordError: a value JSON cannot hold.
    """
    return digest({"op": op, "contract_version": contract_version, "key": dict(key)})


def _identity(backend: str, config: Mapping[str, Scalar]) -> str:
    return canonical([backend, dict(config)])  # unlike ==, tells 1 from True and 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """The outcome of tuning one key in one environment.

    Attributes:
        op, contract_version, key: what was tuned. The measurement policy is a field of the key.
        backend, config: the choice; always one of ``candidates``, with status ``ok``.
        margin_over_runner_up, margin_over_default: how much faster, as a fraction of the other's time (0.05
            is 5 %; negative if the choice is the slower one); None where there is nothing to compare with.
        rule: why this one, in words.
        candidates: all of them, in the tuner's order.
        measured: see :class:`Measured`.
        environment: the environment's hash.

    Raises:
        InvalidRecordError: the fields contradict each other, or a number is not finite.
    """

    op: str
    contract_version: int
    key: dict[str, Scalar]
    backend: str
    config: dict[str, Scalar]
    margin_over_runner_up: float | None
    margin_over_default: float | None
    rule: str
    candidates: tuple[CandidateRecord, ...]
    measured: Measured
    environment: str

    def __post_init__(self) -> None:
        if not _OP_NAME.fullmatch(self.op):
            raise InvalidRecordError(f"op: {self.op!r} is not a plain name")
        if not _HASH.fullmatch(self.environment):
            raise InvalidRecordError(f"environment: {self.environment!r} is not 16 hex digits")
        check_scalars("key", self.key)
        check_scalars("config", self.config)
        for name in ("margin_over_runner_up", "margin_over_default"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name))
        identities = [_identity(candidate.backend, candidate.config) for candidate in self.candidates]
        if len(set(identities)) != len(identities):
            raise InvalidRecordError("a candidate is listed twice")
        if self._find_chosen() is None:
            raise InvalidRecordError(f"the choice {self.label} is not among the candidates that are ok")
        _check_measured(self.measured)
        if self.key.get("policy", self.measured["policy"]) != self.measured["policy"]:
            raise InvalidRecordError(f"key has another policy than measured: {self.measured['policy']!r}")

    def _find_chosen(self) -> CandidateRecord | None:
        wanted = _identity(self.backend, self.config)
        for candidate in self.candidates:
            if candidate.status == "ok" and _identity(candidate.backend, candidate.config) == wanted:
                return candidate
        return None

    @property
    def label(self) -> str:
        """``"backend[config]"`` of the choice."""
        return f"{self.backend}[{config_label(self.config)}]"

    @property
    def chosen(self) -> CandidateRecord:
        """The candidate that was chosen."""
        found = self._find_chosen()
        assert found is not None, "checked on construction"
        return found

    @property
    def key_hash(self) -> str:
        """See :func:`key_hash`."""
        return key_hash(self.op, self.contract_version, self.key)

    @property
    def created(self) -> datetime:
        """When it was measured, with a time zone."""
        return _parse_date(self.measured["created"])

    def stale_backends(self, fingerprints: Mapping[str, str]) -> tuple[str, ...]:
        """Backends measured with another fingerprint than the one in ``fingerprints``, in order of name.

        One that is not in ``fingerprints`` is gone, not changed, so it is not listed.
        """
        return tuple(
            sorted(
                {
                    candidate.backend
                    for candidate in self.candidates
                    if fingerprints.get(candidate.backend, candidate.fingerprint) != candidate.fingerprint
                }
            )
        )

    def fresh_candidates(self, fingerprints: Mapping[str, str]) -> tuple[CandidateRecord, ...]:
        """The candidates whose verdict and samples still hold: same fingerprint, backend still there."""
        return tuple(c for c in self.candidates if fingerprints.get(c.backend) == c.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "contract_version": self.contract_version,
            "key": dict(self.key),
            "backend": self.backend,
            "config": dict(self.config),
            "margin_over_runner_up": self.margin_over_runner_up,
            "margin_over_default": self.margin_over_default,
            "rule": str(self.rule),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "measured": dict(self.measured),
            "environment": self.environment,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Entry:
        """The inverse of :meth:`to_dict`; raises InvalidRecordError."""
        margins = {
            name: None if record.get(name) is None else number(name, record[name])
            for name in ("margin_over_runner_up", "margin_over_default")
        }
        candidates = read(record, "candidates", list)
        if not all(isinstance(candidate, dict) for candidate in candidates):
            raise InvalidRecordError("field 'candidates': expected a list of objects")
        measured: Any = read(record, "measured", dict)  # checked field by field on construction
        return cls(
            op=read(record, "op", str),
            contract_version=read(record, "contract_version", int),
            key=read(record, "key", dict),
            backend=read(record, "backend", str),
            config=read(record, "config", dict),
            **margins,
            rule=read(record, "rule", str),
            candidates=tuple(CandidateRecord.from_dict(candidate) for candidate in candidates),
            measured=measured,
            environment=read(record, "environment", str),
        )

    def to_json(self) -> str:
        """The file text."""
        return seal("entry", self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> Entry:
        """Read a file text; raises InvalidRecordError saying what is wrong with it."""
        return cls.from_dict(unseal("entry", text))


def _check_measured(measured: Mapping[str, Any]) -> None:
    unknown = set(measured) ^ set(Measured.__annotations__)
    if unknown:
        raise InvalidRecordError(f"measured: missing or unknown field(s) {', '.join(sorted(unknown))}")
    if measured["policy"] not in _POLICIES:
        raise InvalidRecordError(f"measured.policy: expected one of {_POLICIES}, given {measured['policy']!r}")
    for name in ("method", "isokern", "created"):
        read(measured, name, str)
    read(measured, "launches", int)
    number("measured.seconds", measured["seconds"])
    _parse_date(measured["created"])
    canonical(dict(measured))


def _parse_date(text: str) -> datetime:
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRecordError(f"measured.created: {text!r} is not an ISO 8601 date") from error
    return date if date.tzinfo else date.replace(tzinfo=UTC)
