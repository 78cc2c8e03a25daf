"""Checks and findings: what is examined, and what came of it. Independent of any op."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..decision import RejectCode, Rejected

if TYPE_CHECKING:
    from .subject import Subject

__all__ = [
    "BackendRaised",
    "Check",
    "Declined",
    "Examination",
    "Finding",
    "Needs",
    "PredicateFault",
    "Status",
    "Tier",
    "Violation",
    "check",
]


class Status(StrEnum):
    """What one examination found. Only ``FAIL`` and ``ERROR`` speak against a backend."""

    PASS = "pass"
    FAIL = "fail"  # a violated assertion, or the backend raised
    DECLINED = "declined"  # the backend's predicate rejects the case, and says why
    ERROR = "error"  # the backend breaks the rules of the suite: unstable predicate, unused exception, nothing ran


class Tier(StrEnum):
    """How dear a check is; ``full`` includes ``fast``."""

    FAST = "fast"  # in every run
    FULL = "full"  # minutes, or gigabytes of address space


class Needs(StrEnum):
    """What a check cannot do without; see ``Subject.has``."""

    ANY = "any"
    CPU = "cpu"  # a backend of the CPU: threads
    HOST = "host"  # tensors in host memory, mapped lazily or with surroundings made for them; in an engine, too
    GPU = "gpu"
    ENGINE = "engine"  # something that executes a GPU language on a CPU and watches its memory accesses


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check on one case.

    Attributes:
        check, case: which; ``case`` says in words what was varied.
        message: why it failed or was declined, or a remark on a pass; may be empty.
        ratio: worst |error| / bound seen, None where bits were compared.
        seconds: wall time, the backend's binding included.
    """

    check: str
    case: str
    status: Status
    message: str = ""
    ratio: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; an infinite or undefined ratio becomes a string (``"inf"``, ``"nan"``)."""
        ratio = self.ratio if self.ratio is None or math.isfinite(self.ratio) else str(self.ratio)
        return {**asdict(self), "status": self.status.value, "ratio": ratio}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """The inverse of :meth:`to_dict`."""
        ratio = None if data["ratio"] is None else float(data["ratio"])
        return cls(**{**data, "status": Status(data["status"]), "ratio": ratio})


class Violation(AssertionError):
    """A check's assertion does not hold for the backend.

    Attributes:
        ratio: as in :class:`Finding`.
        code: what the tuner's gate calls it.
    """

    def __init__(self, message: str, ratio: float | None = None, code: RejectCode = RejectCode.WRONG) -> None:
        super().__init__(message)
        self.ratio = ratio
        self.code = code


class Declined(Exception):
    """The backend does not do the case; carries its verdict."""

    def __init__(self, verdict: Rejected) -> None:
        super().__init__(f"[{verdict.code}] {verdict.reason}")
        self.verdict = verdict


class PredicateFault(Exception):
    """The backend's ``check`` raised, returned no verdict, or answered the same problem in two ways."""


class BackendRaised(Exception):
    """Binding or running raised; ``__cause__`` is what was raised, ``stage`` is ``bind`` or ``run``."""

    def __init__(self, stage: str, error: BaseException) -> None:
        super().__init__(f"{stage} raised {type(error).__name__}: {error}")
        self.stage = stage


#: A case's name, and a function that examines it: returns the worst ratio (None: bits were compared), raises
#: Violation where the assertion does not hold.
Examination = tuple[str, Callable[[], float | None]]


@dataclass(frozen=True, slots=True)
class Check:
    """One assertion over any number of cases.

    Attributes:
        id: ``N1`` ...: numerics, ``M``: metamorphic relations, ``S``: memory safety, ``X``: registry, ``C``: contract.
        title: what must hold, in a few words.
        examinations: lists the cases for a subject, without running them.
        relaxable: compares bit for bit what a backend's exceptions file may hold to a number of bounds instead.
        promise: the backend tag that promises this relation bit for bit; a backend with the tag may not relax it.
    """

    id: str
    title: str
    tier: Tier
    needs: Needs
    examinations: Callable[[Subject], Iterable[Examination]]
    relaxable: bool = False
    promise: str | None = None

    def run(self, subject: Subject) -> Iterator[Finding]:
        """Examine every case, one finding each, lazily. A backend that raises fails the case, nothing else."""
        for case, examine in self.examinations(subject):
            yield self._perform(case, examine)

    def _perform(self, case: str, examine: Callable[[], float | None]) -> Finding:
        start = time.perf_counter()

        def finding(status: Status, message: str, ratio: float | None) -> Finding:
            return Finding(self.id, case, status, message, ratio, time.perf_counter() - start)

        try:
            ratio = examine()
        except Declined as declined:
            return finding(Status.DECLINED, str(declined), None)
        except PredicateFault as fault:
            return finding(Status.ERROR, str(fault), None)
        except Violation as violation:
            return finding(Status.FAIL, str(violation), violation.ratio)
        except BackendRaised as raised:
            return finding(Status.FAIL, str(raised), None)
        return finding(Status.PASS, "", ratio)


def check(
    id: str,
    title: str,
    *,
    tier: Tier = Tier.FAST,
    needs: Needs = Needs.ANY,
    relaxable: bool = False,
    promise: str | None = None,
) -> Callable[[Callable[[Subject], Iterable[Examination]]], Check]:
    """Decorator: a function that lists examinations becomes a :class:`Check`."""

    def wrap(examinations: Callable[[Subject], Iterable[Examination]]) -> Check:
        return Check(id, title, tier, needs, examinations, relaxable, promise)

    return wrap
