"""One candidate of a tuned key: a backend with a config, and the tuner's verdict on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .codec import InvalidRecordError, Scalar, check_scalars, number, read, read_optional

__all__ = ["CandidateRecord", "config_label"]

_STATUSES = ("ok", "rejected")
#: ``RejectCode.SLOW``: what a candidate may have been rejected for and still be right.
_SLOW = "slow"


def config_label(config: Mapping[str, Scalar]) -> str:
    """``"chunk=64,v_tile=32"``; ``"default"`` when there is nothing to set."""
    return ",".join(f"{name}={config[name]}" for name in sorted(config)) or "default"


@functools.cache
def _reject_codes() -> frozenset[str]:
    # not at module level: the registry imports the store
    from ..registry.decision import RejectCode

    return frozenset(code.value for code in RejectCode)


@dataclass(frozen=True, slots=True)
class CandidateRecord:
    """One backend with one config, as the tuner saw it.

    Attributes:
        backend, config: the candidate.
        status: ``"ok"`` (proven correct, in the race) or ``"rejected"``.
        code: for rejected ones, a value of ``registry.decision.RejectCode``; else None.
        reason: in words, why it was rejected.
        median_us: typical time per call in microseconds, where it was timed: the winner's median; of others what they
            took beside the winner, times that.
        samples_us: the single samples, in microseconds, in the order taken.
        fingerprint: the backend's fingerprint when it was measured.
        source: the part of it that is source alone, without versions of what compiles it; "" where it was not recorded.
            Shipped tables are read by it.
        tags: properties that were proven (``repeatable``, ...).

    Raises:
        InvalidRecordError: the fields contradict each other, or a number is not finite.
    """

    backend: str
    config: dict[str, Scalar]
    status: str
    code: str | None = None
    reason: str | None = None
    median_us: float | None = None
    samples_us: tuple[float, ...] = ()
    fingerprint: str = ""
    tags: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        check_scalars("config", self.config)
        if self.status not in _STATUSES:
            raise InvalidRecordError(f"status: expected one of {_STATUSES}, given {self.status!r}")
        if self.status == "ok" and self.code is not None:
            raise InvalidRecordError(f"candidate {self.backend!r} is ok and carries the code {self.code!r}")
        if self.status == "rejected" and self.code not in _reject_codes():
            raise InvalidRecordError(f"candidate {self.backend!r} is rejected with an unknown code {self.code!r}")
        if self.median_us is not None:
            number("median_us", self.median_us)
        for sample in self.samples_us:
            number("samples_us", sample)

    @property
    def label(self) -> str:
        """``"backend[config]"``."""
        return f"{self.backend}[{config_label(self.config)}]"

    @property
    def slower(self) -> bool:
        """Whether all that was held against it is its time."""
        return self.code == _SLOW

    @property
    def right(self) -> bool:
        """Whether it was in the race, or kept out of it for nothing but its time."""
        return self.status == "ok" or self.slower

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "config": dict(self.config),
            "status": self.status,
            "code": None if self.code is None else str(self.code),  # a StrEnum member becomes its plain text
            "reason": self.reason,
            "median_us": self.median_us,
            "samples_us": list(self.samples_us),
            "fingerprint": self.fingerprint,
            "source": self.source,
            "tags": sorted(self.tags),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> CandidateRecord:
        median = record.get("median_us")
        return cls(
            backend=read(record, "backend", str),
            config=read(record, "config", dict),
            status=read(record, "status", str),
            code=read_optional(record, "code", str),
            reason=read_optional(record, "reason", str),
            median_us=None if median is None else number("median_us", median),
            samples_us=tuple(number("samples_us", sample) for sample in read(record, "samples_us", list)),
            fingerprint=read(record, "fingerprint", str),
            tags=tuple(str(tag) for tag in read(record, "tags", list)),
            source=read(record, "source", str) if "source" in record else "",
        )
