"""What differs between two stored entries, and between two stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .candidate import CandidateRecord
from .compare import Differences, differences
from .entry import Entry
from .found import Located

__all__ = ["diff_entries", "diff_stores"]


def diff_entries(first: Located, second: Located) -> Differences:
    """Field by field: environment, op, key, choice, margins, every candidate's outcome, measurement."""
    return differences(_view(first), _view(second))


def diff_stores(first: Iterable[Located], second: Iterable[Located]) -> Differences:
    """Choices that differ, as ``op/key hash -> (choice, choice)``, and the environments' fields.

    Two stores of one environment each, such as two machines', are compared key by key even if those differ,
    and the differing fields are listed as ``environment.*``. With several, only equal environments are
    compared and the key is preceded by the environment's hash.
    """
    ones, twos = list(first), list(second)
    single = len({item.entry.environment for item in ones}) == len({i.entry.environment for i in twos}) == 1
    found: Differences = {}
    if single:
        mine, theirs = ({"environment": _environment(items[0])} for items in (ones, twos))
        found.update(differences(mine, theirs))
    # compared as flat mappings whose names are the keys and whose values are the choices
    found.update(differences(_choices(ones, single), _choices(twos, single)))
    return found


def _choices(items: Iterable[Located], single: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        entry = item.entry
        name = f"{entry.op}/{entry.key_hash}"
        found.setdefault(name if single else f"{entry.environment}/{name}", entry.label)
    return found


def _view(item: Located) -> dict[str, Any]:
    entry: Entry = item.entry
    view = entry.to_dict()
    view["environment"] = _environment(item)
    view["candidates"] = {candidate.label: outcome(candidate) for candidate in entry.candidates}
    return view


def _environment(item: Located) -> Mapping[str, Any]:
    if item.environment is None:
        return {"hash": item.entry.environment}
    record = item.environment.to_dict()
    return {"hash": item.environment.hash, **record}


def outcome(candidate: CandidateRecord) -> str:
    """``"ok 12.3 us"``, ``"ok"`` if it was not timed, or ``"rejected [wrong]"``."""
    text = candidate.status if candidate.code is None else f"{candidate.status} [{candidate.code}]"
    return text if candidate.median_us is None else f"{text} {candidate.median_us:.4g} us"
