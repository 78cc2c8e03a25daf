"""Exceptions: what one backend is excused from, read from its TOML file; every one gives its reason."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RegistrationError

if TYPE_CHECKING:
    from ..backend import Backend

__all__ = ["MAX_LIMIT", "NO_EXCEPTIONS", "ExceptionEntry", "Exceptions", "exceptions_path", "load_exceptions"]

#: Two correct evaluations are each within one bound of the truth, so within two of one another.
MAX_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class ExceptionEntry:
    """One excuse.

    Attributes:
        check: id of the check.
        limit: compare within this many error bounds instead of bit for bit; None for a declared decline.
        reason: why; shown in reports.
        varies: whether it is needed depends on the machine (vector width, matrix library), so it may go unused.
    """

    check: str
    limit: float | None
    reason: str
    varies: bool = False

    @property
    def declares_decline(self) -> bool:
        return self.limit is None


@dataclass(frozen=True, slots=True)
class Exceptions:
    """All excuses of one backend. ``source`` names the file, empty when there is none."""

    entries: Mapping[str, ExceptionEntry] = field(default_factory=dict)
    source: str = ""

    def limit(self, check: str) -> float | None:
        """Limit in bounds for the relations of ``check``; None: bit for bit."""
        entry = self.entries.get(check)
        return None if entry is None else entry.limit

    def must_be_needed(self, check: str) -> bool:
        """Whether the file relaxes ``check`` in a way that some result has to need."""
        entry = self.entries.get(check)
        return entry is not None and not entry.declares_decline and not entry.varies

    def declines(self, check: str) -> bool:
        """Whether the file says that the backend declines every case of ``check``."""
        entry = self.entries.get(check)
        return entry is not None and entry.declares_decline


NO_EXCEPTIONS = Exceptions()


def exceptions_path(op: str, backend: Backend) -> Path | None:
    """The backend's own ``exceptions_file`` if it names one, else ``exceptions/<name>.toml`` beside the op."""
    own = getattr(backend, "exceptions_file", None)
    if own is not None:
        return Path(own)
    package = find_spec(f"{__name__.rsplit('.', 2)[0]}.ops.{op}")
    if package is None or not package.submodule_search_locations:
        return None  # an op from elsewhere: its backends name their files
    return Path(package.submodule_search_locations[0]) / "exceptions" / f"{backend.name}.toml"


def load_exceptions(op: str, backend: Backend) -> Exceptions:
    """Read the backend's exceptions; none where it has no file.

    Raises:
        RegistrationError: a named file is missing, is no TOML, or an entry lacks a check, a reason or a permitted
            relaxation; the message names file and entry.
    """
    path = exceptions_path(op, backend)
    if path is None or not path.is_file():
        if getattr(backend, "exceptions_file", None) is not None:
            raise RegistrationError(f"backend {backend.name!r}: exceptions_file {path} does not exist")
        return NO_EXCEPTIONS
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistrationError(f"{path}: not valid TOML: {error}") from None
    unknown = set(document) - {"exception"}
    if unknown:
        raise RegistrationError(f"{path}: expected only [[exception]] tables, given {', '.join(sorted(unknown))}")
    entries: dict[str, ExceptionEntry] = {}
    for i, table in enumerate(document.get("exception", [])):
        entry = _entry(f"{path}, exception {i + 1}", table)
        if entry.check in entries:
            raise RegistrationError(f"{path}: two exceptions for check {entry.check}")
        entries[entry.check] = entry
    return Exceptions(entries, str(path))


def _entry(where: str, table: Mapping[str, Any]) -> ExceptionEntry:
    unknown = set(table) - {"check", "relation", "limit", "reason", "varies"}
    if unknown:
        raise RegistrationError(f"{where}: unknown key {', '.join(sorted(unknown))}")
    check, reason = table.get("check"), table.get("reason")
    if not isinstance(check, str) or not check:
        raise RegistrationError(f"{where}: check: expected a check's id, given {check!r}")
    if not isinstance(reason, str) or len(reason.split()) < 3:
        raise RegistrationError(f"{where} ({check}): reason: expected a sentence, given {reason!r}")
    varies = table.get("varies", False)
    if not isinstance(varies, bool):
        raise RegistrationError(f"{where} ({check}): varies: expected true or false, given {varies!r}")
    relation, limit = table.get("relation"), table.get("limit")
    if relation == "declined" and limit is None and not varies:
        return ExceptionEntry(check, None, reason)
    if relation != "bound":
        raise RegistrationError(f"{where} ({check}): relation: expected 'bound' or 'declined', given {relation!r}")
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= MAX_LIMIT:
        raise RegistrationError(f"{where} ({check}): limit: expected 0 < limit <= {MAX_LIMIT}, given {limit!r}")
    return ExceptionEntry(check, float(limit), reason, varies)
