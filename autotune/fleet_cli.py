"""Where a warm-up runs: on one device, on several of this host, on a Ray cluster, or on torchrun's ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import ArgumentValueError
from .fleet import member_config, run_fleet
from .fleet_process import ProcessLauncher, Slot, local_slots
from .fleet_ranks import Exchange, claim_local_device, launched_by_torchrun, process_group, run_ranks
from .gpu_identity import VISIBLE, visible_entries
from .progress import Progress
from .warmup import WarmupPlan, WarmupReport, run_warmup

__all__ = ["Venue", "find_venue", "ranks_of", "run_on"]


@dataclass(frozen=True, slots=True)
class Venue:
    """Where to tune.

    Attributes: ``slots`` of this host; ``ray``, a cluster's address, or None; ``ranks``, whether torchrun started us.
    """

    slots: tuple[Slot, ...] = ()
    ray: str | None = None
    ranks: bool = False


def find_venue(device: str, devices: str | None, ray: str | None) -> Venue:
    """From the command's options. Before anything asks CUDA for its devices.

    A rank's device, and a slot that is the only one, is made all that this process sees: it is planned for and tuned
    on like any first device.

    Args: device: ``cpu``, ``cuda`` or ``auto``. devices: ``all``, or indices such as ``0,2``; None takes the first.

    Raises: ArgumentValueError: impossible, or two of them at once.
    """
    ranks = launched_by_torchrun()
    if sum((devices is not None, ray is not None, ranks)) > 1:
        raise ArgumentValueError("--devices, --ray", "at most one of them, and none under torchrun", "several")
    if ranks:
        # Where every GPU is hidden, "auto" is the CPU.
        if device != "cpu" and not (device == "auto" and visible_entries() == ()):
            claim_local_device()
        return Venue(ranks=True)
    slots = () if devices is None else local_slots(device, _indices(devices))
    if len(slots) == 1 and slots[0].visible is not None:
        os.environ[VISIBLE] = slots[0].visible
    return Venue(slots=slots, ray=ray)


def _indices(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise ArgumentValueError("--devices", "'all', or indices such as '0,2', each once", repr(text))
    return tuple(int(part) for part in parts)


def run_on(
    venue: Venue,
    plan: WarmupPlan,
    progress: Progress,
    budget_s: float | None,
    exchange: Exchange | None = None,
) -> tuple[WarmupReport, ...]:
    """Tune ``plan`` there; a report per environment. Raises as ``run_fleet``, ``run_ranks`` and ``run_warmup``."""
    todo = any(not problem.known for problem in plan.problems)
    if exchange is not None:
        return (run_ranks(plan, exchange, progress, budget_s=budget_s),)
    if venue.ray is not None:
        from .fleet_ray import RayLauncher

        launcher = RayLauncher(member_config(plan, share_store=False), venue.ray)
        return run_fleet(plan, launcher, progress, budget_s=budget_s)
    if todo and _elsewhere(venue.slots):
        return run_fleet(plan, ProcessLauncher(venue.slots, member_config(plan)), progress, budget_s=budget_s)
    return (run_warmup(plan, progress, budget_s=budget_s),)


def _elsewhere(slots: tuple[Slot, ...]) -> bool:
    """Whether it takes other processes: for several slots, or for one that is not all that this process sees."""
    return len(slots) > 1 or any(slot.visible not in (None, os.environ.get(VISIBLE)) for slot in slots)


@contextmanager
def ranks_of(venue: Venue) -> Iterator[Exchange | None]:
    """Torchrun's ranks, if the venue is they; to be held from planning to reporting."""
    if not venue.ranks:
        yield None
        return
    with process_group() as exchange:
        yield exchange
