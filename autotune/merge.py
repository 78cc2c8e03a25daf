"""Results of several tuners in one store, and one file of them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cache.entry import key_hash
from ..cache.plan import Plan
from ..cache.store import Store
from ..cache.transfer import Parcel, absorb, movable
from ..errors import StoreError
from .warmup import WarmupPlan

__all__ = ["parcels_of", "save_plan", "take_over"]


def take_over(store: Store, parcels: Sequence[Parcel]) -> None:
    """Put what others tuned into ``store``; of one key the newer measurement stays.

    Where it cannot be written it is kept in memory, with the store's one warning.
    """
    layer = store.writable_layer
    try:
        if layer is not None:
            absorb(layer, parcels)
            store.refresh()
            return
    except StoreError:
        pass  # the disk is full, or read-only: put() below says so and keeps it
    for entry, environment in parcels:
        store.put(entry, environment)


def parcels_of(plan: WarmupPlan) -> list[Parcel]:
    """What ``plan``'s store now holds for the problems of ``plan``."""
    wanted = {(p.task.recipe.op, _hash(plan, p.task.recipe.op, p.task.key)) for p in plan.problems}
    found, _ = movable(plan.store.entries(plan.environment))
    return [(entry, environment) for entry, environment in found if (entry.op, entry.key_hash) in wanted]


def _hash(plan: WarmupPlan, op: str, key: dict[str, Any]) -> str:
    return key_hash(op, plan.registry.spec(op).contract_version, key)


def save_plan(plan: WarmupPlan, path: Path) -> Plan:
    """Write the choices for the problems of ``plan`` as a plan file, for all ranks of a job; returns the plan.

    Raises: PlanError, if the file cannot be written.
    """
    prints = {
        op: {name: plan.registry.fingerprint(op, name) for name in plan.registry.backends(op)}
        for op in {p.task.recipe.op for p in plan.problems}
    }
    wanted = {_hash(plan, p.task.recipe.op, p.task.key) for p in plan.problems}
    everything = Plan.from_store(plan.store, plan.environment, prints)
    chosen = Plan(plan.environment, tuple(c for c in everything.choices if c.key_hash in wanted))
    chosen.save(path)
    return chosen
