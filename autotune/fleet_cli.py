"""Where a warm-up runs: on one device, on several of this host, on a Ray cluster, or on torchrun's ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import ArgumentValueError
from .fleet import member_config, run_fleet
from .fleet_process import ProcessLauncher, Slot, local_slots
from .fleet_ranks import Exchange, claim_local_device, launched_by_torchrun, process_group, run_ranks
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

    Args: device: ``cpu``, ``cuda`` or ``auto``. devices: ``all``, or indices such as ``0,2``; None takes one.

    Raises: ArgumentValueError: impossible, or two of them at once.
    """
    ranks = launched_by_torchrun()
    if sum((devices is not None, ray is not None, ranks)) > 1:
        raise ArgumentValueError("--devices, --ray", "at most one of them, and none under torchrun", "several")
    if ranks:
        if device != "cpu":
            claim_local_device()
        return Venue(ranks=True)
    return Venue(slots=() if devices is None else local_slots(device, _indices(devices)), ray=ray)


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
    if todo and len(venue.slots) > 1:
        return run_fleet(plan, ProcessLauncher(venue.slots, member_config(plan)), progress, budget_s=budget_s)
    return (run_warmup(plan, progress, budget_s=budget_s),)


@contextmanager
def ranks_of(venue: Venue) -> Iterator[Exchange | None]:
    """Torchrun's ranks, if the venue is they; to be held from planning to reporting."""
    if not venue.ranks:
        yield None
        return
    with process_group() as exchange:
        yield exchange
