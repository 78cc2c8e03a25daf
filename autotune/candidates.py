"""Admission: which (backend, config) pairs may be tried on a problem, and why the others may not."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.candidate import CandidateRecord
from ..errors import IsokernError
from ..registry.backend import Config
from ..registry.core import Registry
from ..registry.decision import RejectCode, Rejected
from ..registry.selection import verdicts
from .recipe import Origin, origin_of
from .spared import outclassed, spared

__all__ = ["PREDICATE_CODES", "Admission", "Candidate", "admit"]

#: Codes that a predicate gives; the others come from the gate and from timing.
PREDICATE_CODES = frozenset(
    {
        RejectCode.NOT_INSTALLED,
        RejectCode.DEVICE,
        RejectCode.ARCH,
        RejectCode.DTYPE,
        RejectCode.SHAPE,
        RejectCode.LAYOUT,
        RejectCode.FEATURE,
        RejectCode.GRAD,
        RejectCode.MODE,
        RejectCode.POLICY,
        RejectCode.HOPELESS,
    }
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend with one config; ``fingerprint`` is the backend's, ``origin`` where a worker finds it, ``source`` the
    part of its fingerprint that is source alone."""

    backend: str
    config: Config
    fingerprint: str
    origin: Origin | None = None
    source: str = ""

    @property
    def name(self) -> str:
        """``"backend[config]"``, unique among a problem's candidates."""
        return f"{self.backend}[{self.config.label}]"

    def to_request(self) -> dict[str, Any]:
        """As a worker's ``bind`` expects it."""
        return {
            "name": self.name,
            "backend": self.backend,
            "config": self.config.to_dict(),
            "origin": self.origin.to_dict() if self.origin else None,
        }

    def rejected(self, verdict: Rejected) -> CandidateRecord:
        """The record of its rejection, without samples."""
        return CandidateRecord(
            self.backend,
            dict(self.config.to_dict()),
            "rejected",
            verdict.code.value,
            verdict.reason,
            fingerprint=self.fingerprint,
            source=self.source,
        )


@dataclass(frozen=True, slots=True)
class Admission:
    """Attributes:
    candidates: of the accepting backends, in heuristic order, each backend's configs in its own order.
    declined: a record per backend whose predicate says no, that is known to lose, or that offers no config; and per
        config that is known to lose.
    """

    candidates: tuple[Candidate, ...]
    declined: tuple[CandidateRecord, ...]

    @property
    def default(self) -> str | None:
        """The heuristic choice: what runs where nothing is tuned."""
        return self.candidates[0].name if self.candidates else None

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of every registered backend, declined ones included."""
        declined = {c.backend: c.fingerprint for c in self.declined}
        return declined | {c.backend: c.fingerprint for c in self.candidates}


def admit(registry: Registry, op: str, problem: Any, keep: Container[str] = ()) -> Admission:
    """Ask every registered backend of ``op``.

    Args:
        keep: names of candidates that are tried even if they are known to lose, such as the one chosen before.

    Raises:
        PredicateError: a predicate has a bug; dispatch would raise it as well, for every call.
    """
    backends, sources = registry.backends(op), registry.source_fingerprints(op)
    candidates: list[Candidate] = []
    declined: list[CandidateRecord] = []
    last_resort: list[Candidate] = []
    for outcome in verdicts(backends, problem):
        backend = backends[outcome.backend]
        fingerprint = registry.fingerprint(op, backend.name)
        verdict: Any = outcome.verdict
        configs: Sequence[Config] = ()
        why: str | None = None
        if not isinstance(verdict, Rejected):
            try:
                why = backend.hopeless(problem) or outclassed(backend, problem)
                configs = tuple(dict.fromkeys(backend.configs(problem)))  # one listed twice is one candidate
                verdict = Rejected(RejectCode.COMPILE, "configs() is empty")
            except IsokernError:
                raise
            except Exception as error:  # noqa: BLE001 - a third party's code; it becomes the reason of its rejection
                verdict = Rejected(RejectCode.COMPILE, f"{type(error).__name__} raised by its configs: {error}")
        origin = origin_of(backend) if configs else None
        source = sources[backend.name]
        offered = [Candidate(backend.name, config, fingerprint, origin, source) for config in configs]
        if offered and why is None:
            lost = spared(backend, configs, problem)
            for candidate in offered:
                if candidate.config in lost and candidate.name not in keep:
                    declined.append(candidate.rejected(Rejected(RejectCode.HOPELESS, lost[candidate.config])))
                else:
                    candidates.append(candidate)
        else:
            last_resort += offered
            verdict = verdict if why is None else Rejected(RejectCode.HOPELESS, why)
            declined.append(Candidate(backend.name, Config(), fingerprint, source=source).rejected(verdict))
    if not candidates:  # those known to lose against others have none to lose against
        names = {candidate.backend for candidate in last_resort}
        return Admission(tuple(last_resort), tuple(record for record in declined if record.backend not in names))
    return Admission(tuple(candidates), tuple(declined))
