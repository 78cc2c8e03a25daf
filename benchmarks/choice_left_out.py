"""How well a store's entries are foretold by the others: each is left out in turn, and chosen for by what is near it.

Needs no device, only a store: the regret comes from the medians that the entry itself holds. It is harder than serving
what lies between tuned sizes, since leaving one out of few opens a gap; it is there to compare rules with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from record import Row

from isokern.autotune.candidates import PREDICATE_CODES
from isokern.cache.candidate import CandidateRecord
from isokern.cache.entry import Entry
from isokern.cache.found import Located
from isokern.cache.neighbours import neighbours
from isokern.registry.decision import Rule
from isokern.registry.forecast import forecast, typical_us

__all__ = ["left_out"]

SIZES = ("n", "tokens", "longest", "length_class")
#: Candidates that were not called, because others took less than half their time, are charged this much.
_AT_LEAST = 1.0


def left_out(located: Iterable[Located]) -> list[Row]:
    """A row per entry: what would run there if it were not stored, against what tuning chose there.

    Not against the fastest of all: of twenty equals that were timed five times each, one looks a tenth faster than it
    is.

    ``extra``: ``regret`` and ``default_regret`` (the heuristic choice's) as fractions of the chosen one's time, below 0
    where that gave way to an equal; 1 where the candidate was too slow to be called; ``by``, how many entries it was
    judged by; ``rule``.
    """
    entries = list(located)
    rows = []
    for item in entries:
        entry = item.entry
        others = [other for other in entries if other is not item and _alike(other.entry, entry)]
        rows.append(_row(entry, others))
    return rows


def _alike(one: Entry, two: Entry) -> bool:
    first, second = ((e.op, e.contract_version, e.environment) for e in (one, two))
    return first == second and one.key_hash != two.key_hash  # the same one may stand in several layers


def _row(entry: Entry, others: Sequence[Located]) -> Row:
    prints = {c.backend: c.fingerprint for c in entry.candidates}
    offered = {c.label: c for c in entry.candidates if c.code not in PREDICATE_CODES}
    default = next(iter(offered.values()))  # the tuner lists them in heuristic order
    near = neighbours(others, entry.key, SIZES)
    found = forecast(near, lambda record: record.label in offered, default.label, prints)
    chosen = default if found is None else offered[found.record.label]
    times = typical_us(entry, prints)
    mode, kind = entry.measured["policy"], entry.key["length_class"]
    sizes = " ".join(f"{name}<={entry.key[name]}" for name in SIZES[:3] if name in entry.key)
    row = Row(f"{mode} {sizes} {kind}", "isokern", chosen.backend, chosen.label.partition("[")[2].removesuffix("]"))
    row.extra = {
        "what": "left_out",
        "key": entry.key_hash,
        "choice": chosen.label,
        "best": entry.label,
        "rule": (Rule.HEURISTIC if found is None else Rule.NEIGHBOUR).value,
        "regret": _regret(chosen, times, entry.label),
        "default_regret": _regret(default, times, entry.label),
        "by": 0 if found is None else len(found.by),
    }
    return row


def _regret(record: CandidateRecord, times: dict[str, float], best: str) -> float:
    us = times.get(record.label, math.inf)  # found wrong there: as bad as too slow
    return us / times[best] - 1.0 if math.isfinite(us) else _AT_LEAST
