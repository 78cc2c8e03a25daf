"""Tables that travel in the package: whose machine is like this one, and which of their candidates count here.

A table was made with one driver and one set of libraries, and is read with others. So its rows go by the part of a
fingerprint that is source alone, and its machines by their silicon; everything else that differs is said, not hidden.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .candidate import CandidateRecord
from .compare import ABSENT
from .entry import Entry
from .environment import Environment
from .layer import Layer
from .silicon import CpuSilicon, CudaSilicon

__all__ = ["SHIPPED", "Table", "by_nearness", "is_current", "made_with", "ranked", "rebased", "silicon_distance"]

#: The layer that is looked up by silicon, too.
SHIPPED = "shipped"

#: What a time of first calls alone counts for: they are few, and the first ones.
_UNSURE = 1.25


@dataclass(frozen=True, slots=True)
class Table:
    """The entries of one environment in a layer of shipped tables."""

    layer: Layer
    environment: Environment


def silicon_distance(here: CpuSilicon | CudaSilicon, there: CpuSilicon | CudaSilicon) -> tuple[float, ...] | None:
    """How unlike two processors are, to be compared in order; all zeros for the same one, None if nothing carries over.

    CUDA devices: the compute capability (major, then minor version), then the SMs, then the memory, as doublings. CPUs
    of one architecture: how many deciding instruction sets only one of them has, then the cores, as doublings.
    """
    if isinstance(here, CudaSilicon) and isinstance(there, CudaSilicon):
        one, two = _capability(here), _capability(there)
        if one is None or two is None:
            return None
        apart = (float(abs(one[0] - two[0])), float(abs(one[1] - two[1])))
        return (*apart, _doublings(here.sm_count, there.sm_count), _doublings(here.memory_gib, there.memory_gib))
    if isinstance(here, CpuSilicon) and isinstance(there, CpuSilicon) and here.arch == there.arch:
        alone = len(set(here.isa) ^ set(there.isa))
        return (float(alone), _doublings(here.logical_cores, there.logical_cores))
    return None


def _capability(silicon: CudaSilicon) -> tuple[int, int] | None:
    major, _, minor = silicon.capability.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _doublings(one: int, two: int) -> float:
    return abs(math.log2(max(1, one) / max(1, two)))


def by_nearness(tables: Iterable[Table], here: Environment) -> tuple[Table, ...]:
    """Those that say something about ``here``: the nearest silicon first, then the nearest number of threads, then
    what differs in the fewest other fields, then by hash."""
    found = []
    for table in tables:
        made_in = table.environment
        distance = silicon_distance(here.silicon, made_in.silicon)
        if distance is not None:
            order = (distance, _doublings(here.threads, made_in.threads), len(here.diff(made_in)), made_in.hash)
            found.append((order, table))
    return tuple(table for _, table in sorted(found, key=lambda pair: pair[0]))


def made_with(made_in: Environment, here: Environment) -> str:
    """In what a table's environment differs, in words: ``"triton 3.6.0, here 3.8.0; python 3.12, here 3.11"``.

    Empty if it is this very environment.
    """
    return "; ".join(
        f"{name.removeprefix('versions.').removeprefix('silicon.')} {_said(theirs)}, here {_said(mine)}"
        for name, (mine, theirs) in here.diff(made_in).items()
    )


def _said(value: object) -> str:
    if value == ABSENT:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def is_current(record: CandidateRecord, fingerprints: Mapping[str, str], sources: Mapping[str, str]) -> bool:
    """Whether the backend's source is what was measured; the whole fingerprint where the record has no source part.

    Args: fingerprints, sources: current ones of each registered backend, whole and of its source alone.
    """
    if record.source:
        return sources.get(record.backend) == record.source
    return fingerprints.get(record.backend) == record.fingerprint


def rebased(entry: Entry, fingerprints: Mapping[str, str], sources: Mapping[str, str]) -> Entry:
    """``entry`` as if this installation had measured it: what is current by its source has the current fingerprint.

    What is read from it then treats shipped rows as any others: those of changed backends are stale, one by one.
    """
    candidates = tuple(
        dataclasses.replace(record, fingerprint=fingerprints[record.backend])
        if record.backend in fingerprints and is_current(record, fingerprints, sources)
        else record
        for record in entry.candidates
    )
    return dataclasses.replace(entry, candidates=candidates)


def ranked(entry: Entry, fingerprints: Mapping[str, str]) -> tuple[CandidateRecord, ...]:
    """The candidates that count, best first: the choice, then by their times; first calls alone count for more.

    None that was found wrong or broken, that has changed, or that was never timed.
    """
    fresh = [c for c in entry.fresh_candidates(fingerprints) if c.right]
    timed = [c for c in fresh if c.median_us is not None and c.label != entry.label]
    timed.sort(key=lambda c: ((c.median_us or 0.0) * (1.0 if c.samples_us else _UNSURE), c.label))
    return (*(c for c in fresh if c.label == entry.label), *timed)
