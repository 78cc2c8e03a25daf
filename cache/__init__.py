"""The persistent tuning store: what won for each key, in which environment, and why.

    store = Store.default()
    found = store.get("fused_sigmoid_gating", 1, key, current_environment("cpu"), fingerprints)

``environment``: what a measurement holds for. ``entry``: one stored choice with all its candidates. ``layer``
and ``store``: directories of entries and the search through them. ``shipped``: tables that travel in the package, which
other machines read; ``extract``, ``shipping``: how they are made. ``plan``: an immutable set of choices that
the ranks of a job agree on. ``journal``: an interrupted tuning run's memory. ``cli``: ``isokern cache``.
"""

from .candidate import CandidateRecord
from .entry import Entry, Measured, key_hash
from .environment import Environment, current_environment
from .found import Hit, Located, Miss, Nearest
from .journal import Journal
from .layer import Layer
from .plan import Choice, Plan
from .store import CacheWarning, Store

__all__ = [
    "CacheWarning",
    "CandidateRecord",
    "Choice",
    "Entry",
    "Environment",
    "Hit",
    "Journal",
    "Layer",
    "Located",
    "Measured",
    "Miss",
    "Nearest",
    "Plan",
    "Store",
    "current_environment",
    "key_hash",
]
