"""What is stored for other machines and other sizes says about a problem that nothing was tuned for here.

In order: a shipped table of this silicon, what was tuned here for a batch of about this size, what that table has for
one, and then the same of the table of the most similar silicon.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cache.shipped import made_with, ranked, rebased
from .backend import Backend, Config
from .decision import Accepted, Rejected, Rule
from .forecast import forecast
from .selection import Suggestion, Suggestions, verdicts

if TYPE_CHECKING:
    from ..cache.candidate import CandidateRecord
    from ..cache.entry import Entry
    from ..cache.neighbours import Neighbour
    from ..cache.shipped import Table
    from .core import Registry
    from .spec import OpSpec

__all__ = ["Untuned", "shipped_entries"]

#: How many times as long as a choice that has changed since another may have taken and still stand in for it: what was
#: changed rarely became slower by more.
_STANDS_IN = 1.1


class _Offers:
    """What is offered here for one problem. Every predicate is asked once."""

    def __init__(self, backends: Mapping[str, Backend], problem: Any) -> None:
        self._backends = backends
        self._problem = problem
        self._verdicts = {outcome.backend: outcome.verdict for outcome in verdicts(backends, problem)}
        able = [name for name, verdict in self._verdicts.items() if isinstance(verdict, Accepted)]
        self.first = able[0] if able else None  # known to lose or not, it would be the choice
        self._configs: dict[str, frozenset[Config]] = {}
        self._hopeless: dict[str, str | None] = {}

    @property
    def default(self) -> str | None:
        """``backend[config]`` of the heuristic choice; None if every backend declines."""
        if self.first is None:
            return None
        return f"{self.first}[{self._backends[self.first].configs(self._problem)[0].label}]"

    def why_not(self, record: CandidateRecord) -> str:
        """Why a candidate cannot run, in words; "" if its backend accepts the problem and offers its config."""
        verdict = self._verdicts.get(record.backend)
        if verdict is None:
            return "it is not registered"
        if isinstance(verdict, Rejected):
            return verdict.reason
        if record.backend not in self._configs:
            self._configs[record.backend] = frozenset(self._backends[record.backend].configs(self._problem))
        offered = Config.from_dict(dict(record.config)) in self._configs[record.backend]
        return "" if offered else "this config is not offered here"

    def may_win(self, record: CandidateRecord) -> bool:
        """Whether its backend can run the problem, by this config or another, and is not known to lose at this size."""
        name = record.backend
        if not isinstance(self._verdicts.get(name), Accepted):
            return False
        if name not in self._hopeless:
            self._hopeless[name] = self._backends[name].hopeless(self._problem)
        return name == self.first or self._hopeless[name] is None

    def promising(self, record: CandidateRecord) -> bool:
        """Whether it can run, and is not known to lose at this size."""
        return not self.why_not(record) and self.may_win(record)


class Untuned:
    """One problem without an entry that a user or site made for it.

    Args: fingerprints: current ones of each registered backend.
    """

    def __init__(self, registry: Registry, spec: OpSpec, problem: Any, fingerprints: Mapping[str, str]) -> None:
        self._registry = registry
        self._spec = spec
        self._problem = problem
        self._key: dict[str, Any] = problem.tuning_key()
        self._sizes: Sequence[str] = getattr(problem, "sizes", ())
        self._prints = fingerprints
        self._environment = registry.environment(problem.device)
        self._notes: list[str] = []
        self._lazy_offers: _Offers | None = None

    @property
    def _offers(self) -> _Offers:
        if self._lazy_offers is None:  # predicates are asked only where there is something to ask about
            self._lazy_offers = _Offers(self._registry.backends(self._spec.name), self._problem)
        return self._lazy_offers

    def suggestions(self) -> Suggestions:
        """The best that is known, if anything is, with notes on what was found in vain."""
        tables = self._registry.store.tables(self._environment)
        same = [t for t in tables if t.environment.silicon == self._environment.silicon]
        found: Suggestion | None = None
        for table in same:
            found = found or self._exact(table, Rule.TUNED_SHIPPED)
        found = found or self._near_here()
        for table in same:
            found = found or self._near(table, Rule.NEIGHBOUR)
        for table in tables:
            if table not in same:
                found = found or self._exact(table, Rule.OTHER_SILICON) or self._near(table, Rule.OTHER_SILICON)
        return Suggestions(() if found is None else (found,), tuple(self._notes))

    # ---- exactly this key

    def _exact(self, table: Table, rule: Rule) -> Suggestion | None:
        """The choice of a table, or where that cannot be, the next best of its entry that can.

        Nothing where the choice's backend could run but has changed, or its configs have, unless the next best took
        hardly longer: how fast that backend is now nobody knows, but leaving it for one that took several times as long
        would be no choice.
        """
        stored = _entry_in(self._registry, table, self._spec, self._key)
        if stored is None:
            return None
        entry = rebased(stored, self._prints, self._registry.source_fingerprints(self._spec.name))
        why_not = self._offers.why_not if rule is Rule.TUNED_SHIPPED else self._why_not_promising
        record = next((c for c in ranked(entry, self._prints) if not why_not(c)), None)
        name, chosen = _name(table), record is not None and record.label == entry.label
        if not chosen:
            self._notes.append(f"{name}: its choice {entry.label} does not apply: {self._missing(entry, why_not)}")
        if record is None:
            self._notes.append(f"{name}: nor does any other candidate that was timed there")
            return None
        if not chosen and self._offers.may_win(entry.chosen) and not _stands_in(record, entry):
            self._notes.append(f"{name}: {record.label} does not stand in for it, {_beside(record, entry)}")
            return None
        measured = next(c.fingerprint for c in stored.candidates if c.label == record.label)
        self._notes.append(self._origin(table, measured == self._prints[record.backend]))
        detail = f"{name}: {entry.rule if chosen else _beside(record, entry)}"
        return Suggestion(rule, record.backend, dict(record.config), detail)

    def _why_not_promising(self, record: CandidateRecord) -> str:
        return self._offers.why_not(record) or ("" if self._offers.promising(record) else "it is known to lose here")

    def _missing(self, entry: Entry, why_not: Callable[[CandidateRecord], str]) -> str:
        current = self._prints.get(entry.backend)
        if current is not None and current != entry.chosen.fingerprint:
            return f"{entry.backend!r} has changed since it was measured"
        return why_not(entry.chosen)

    # ---- sizes near it

    def _near_here(self) -> Suggestion | None:
        if not self._sizes:
            return None
        op, version = self._spec.name, self._spec.contract_version
        near = self._registry.store.neighbours(op, version, self._key, self._sizes, self._environment)
        return self._foretold(near, Rule.NEIGHBOUR)

    def _near(self, table: Table, rule: Rule) -> Suggestion | None:
        if not self._sizes:
            return None
        op, version = self._spec.name, self._spec.contract_version
        near = self._registry.store.neighbours_in_table(table, op, version, self._key, self._sizes)
        sources = self._registry.source_fingerprints(op) if near else {}
        near = [
            dataclasses.replace(
                n, located=dataclasses.replace(n.located, entry=rebased(n.located.entry, self._prints, sources))
            )
            for n in near
        ]
        found = self._foretold(near, rule)
        if found is None:
            return None
        self._notes.append(self._origin(table, True))
        return dataclasses.replace(found, detail=f"{_name(table)}: {found.detail}")

    def _foretold(self, near: Sequence[Neighbour], rule: Rule) -> Suggestion | None:
        """What is expected to be fastest by what was tuned for other sizes, as far as it is offered for this one."""
        if not near or self._offers.first is None:
            return None
        found = forecast(near, self._offers.promising, self._offers.default, self._prints)
        if found is None:
            return None
        return Suggestion(rule, found.record.backend, dict(found.record.config), found.text)

    def _origin(self, table: Table, compiled_alike: bool) -> str:
        """What differs between the machine that made the table and this one."""
        unlike = made_with(table.environment, self._environment)
        if unlike:
            return f"{_name(table)} was made with {unlike}"
        return f"{_name(table)} was made in this environment" + ("" if compiled_alike else ", but for what compiles it")


def _name(table: Table) -> str:
    return f"shipped table of {table.environment.describe()}"


def _beside(record: CandidateRecord, entry: Entry) -> str:
    """What a candidate took there, beside the choice."""
    how = "" if record.samples_us or record.status == "ok" else ", by its first calls alone"
    best = entry.chosen.median_us
    took = "" if not best or record.median_us is None else f", which took {record.median_us / best:.2f} times as long"
    return f"the next best that runs here{took}{how}"


def _stands_in(record: CandidateRecord, entry: Entry) -> bool:
    best = entry.chosen.median_us
    return not best or record.median_us is None or record.median_us <= _STANDS_IN * best


def _entry_in(registry: Registry, table: Table, spec: OpSpec, key: Mapping[str, Any]) -> Entry | None:
    located = registry.store.in_table(table, spec.name, spec.contract_version, key)
    return None if located is None else located.entry


def shipped_entries(registry: Registry, spec: OpSpec, problem: Any, same: bool) -> Iterator[tuple[str, Entry]]:
    """The shipped entries for exactly this problem, nearest table first, each with its table's name.

    What is current in them has the current fingerprint; see :func:`isokern.cache.shipped.rebased`.

    Args: same: those of this machine's silicon; else those of other silicon.
    """
    environment, key = registry.environment(problem.device), problem.tuning_key()
    for table in registry.store.tables(environment):
        if (table.environment.silicon == environment.silicon) is same:
            entry = _entry_in(registry, table, spec, key)
            if entry is not None:
                sources = registry.source_fingerprints(spec.name)
                yield _name(table), rebased(entry, registry.fingerprints(spec.name), sources)
