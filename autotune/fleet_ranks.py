"""A warm-up under torchrun, on one host or several: each rank tunes its share on its own device and into its own store,
then all exchange what they found, so that every host's store ends up with everything.

    torchrun --nnodes 2 --nproc-per-node 8 ... -m isokern warmup --model qwen3-next-80b-a3b --tp 4

Work is dealt out beforehand from what all ranks say they know and have to do, which is the same list on each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..cache.entry import key_hash
from ..cache.transfer import pack, unpack
from ..errors import ArgumentValueError, StoreError
from .compiling import processors
from .gpu_identity import VISIBLE, visible_entries
from .merge import parcels_of, take_over
from .progress import Progress
from .prove import Proof
from .warmup import PlannedProblem, ProblemReport, WarmupPlan, WarmupReport, run_warmup
from .worth import Unit, deal, units

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Exchange", "claim_local_device", "key_of", "launched_by_torchrun", "process_group", "run_ranks"]

#: A rank that has little to tune waits for the one that has most; a lost one is noticed by its closed connection.
_PATIENCE = timedelta(days=1)


def launched_by_torchrun() -> bool:
    """Whether this process is one of several ranks that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def claim_local_device() -> None:
    """Make the device of this rank's place on its host the only visible one. Before anything asks CUDA.

    Raises: ArgumentValueError: CUDA_VISIBLE_DEVICES leaves this rank none. A hidden one is somebody else's.
    """
    index = int(os.environ.get("LOCAL_RANK", "0"))
    entries = visible_entries()
    if entries is not None and index >= len(entries):
        expected = "a device for each rank that --nproc-per-node starts"
        given = f"{os.environ[VISIBLE]!r}, with {len(entries)} of them and none for LOCAL_RANK {index}"
        raise ArgumentValueError(VISIBLE, expected, given)
    os.environ[VISIBLE] = str(index) if entries is None else entries[index]


@contextmanager
def process_group() -> Iterator[Exchange]:
    """The ranks that torchrun started, talking over the network's CPU side; ended on leaving."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Exchange(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Exchange:
    """All ranks give a JSON value, and get everyone's, by rank. Every rank must call as often as the others."""

    rank: int
    size: int

    def all(self, value: Any) -> list[Any]:
        """Everyone's value. Raises: RuntimeError, if a rank is gone."""
        import torch
        import torch.distributed as dist

        data = json.dumps(value, allow_nan=False).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        mine = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        every = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [json.loads(text.numpy().tobytes()) for text in every]


def _compilers() -> int | None:
    """Processes that compile for this rank: those of the host's other ranks do so at the same time."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None if ranks <= 1 else max(1, processors() // ranks - 1)


def run_ranks(
    plan: WarmupPlan,
    exchange: Exchange,
    progress: Progress | None = None,
    *,
    budget_s: float | None = None,
    check: bool = True,
) -> WarmupReport:
    """Tune this rank's share, then exchange; the report is of the whole environment, the same on each of its ranks.

    Collective: all ranks call it, with the same model and workload. A rank that fails still takes part in the
    exchange, so that the others get what it had done, and raises afterwards.

    Raises:
        Interrupted, WorkerError: as :func:`.warmup.run_warmup`. RuntimeError: another rank is gone.
    """
    everyone = exchange.all(_standing(plan))
    share = _share(plan, everyone, exchange.rank)
    tuned: WarmupReport | None = None
    failure: BaseException | None = None
    try:
        mine = replace(plan, problems=share)
        tuned = run_warmup(mine, progress, budget_s=budget_s, check=check, compilers=_compilers())
    except BaseException as error:  # noqa: BLE001 - whatever it is, the others wait; it is raised again below
        failure = error
    told = exchange.all(
        {
            "bundle": pack(parcels_of(plan)),
            "environment": plan.environment.hash,
            "reports": [] if tuned is None else [_record(plan, report) for report in tuned.problems],
            "workers": 0 if tuned is None else tuned.workers,
            "seconds": 0.0 if tuned is None else tuned.seconds,
        }
    )
    for rank, message in enumerate(told):
        if rank != exchange.rank:
            _accept(plan, rank, message["bundle"], progress or Progress())
    if failure is not None:
        raise failure
    plan.registry.refresh()
    return _whole(plan, [message for message in told if message["environment"] == plan.environment.hash])


def _accept(plan: WarmupPlan, rank: int, bundle: str, progress: Progress) -> None:
    try:
        take_over(plan.store, unpack(bundle, f"rank {rank}"))
    except StoreError as error:  # another version of isokern there
        progress.note(f"what rank {rank} tuned cannot be used: {error}")


# ---- who tunes what


def _standing(plan: WarmupPlan) -> dict[str, Any]:
    """What this rank knows and would have to do."""
    return {
        "environment": plan.environment.hash,
        "known": [key_of(plan, p) for p in plan.problems if p.known],
        "seconds": {key_of(plan, p): p.estimate_s for p in plan.problems if not p.known},
    }


def key_of(plan: WarmupPlan, planned: PlannedProblem) -> str:
    """What ``planned`` is stored under. Names of cases tell nothing: two models' problems share them."""
    op = planned.task.recipe.op
    return key_hash(op, plan.registry.spec(op).contract_version, planned.task.key)


def _share(plan: WarmupPlan, everyone: Sequence[Mapping[str, Any]], rank: int) -> tuple[PlannedProblem, ...]:
    """This rank's problems: of those that nobody of its environment knows, its hand.

    Estimates come from each rank's own measurements, so the largest counts: all ranks must deal the same cards.
    """
    peers = [i for i, one in enumerate(everyone) if one["environment"] == plan.environment.hash]
    known = set(chain.from_iterable(everyone[i]["known"] for i in peers))
    open_ = [
        replace(p, entry=None, estimate_s=max(everyone[i]["seconds"].get(key, 0.0) for i in peers))
        for p in plan.problems
        if (key := key_of(plan, p)) not in known
    ]
    hand: Sequence[Unit] = deal(units(open_), len(peers))[peers.index(rank)]
    return tuple(p for unit in hand for p in unit.problems)


# ---- one report of all


def _record(plan: WarmupPlan, report: ProblemReport) -> dict[str, Any]:
    proof = None if report.proof is None else asdict(report.proof)
    key = key_of(plan, report.planned)
    return {"key": key, "seconds": report.seconds, "error": report.error, "proof": proof}


def _whole(plan: WarmupPlan, told: Sequence[Mapping[str, Any]]) -> WarmupReport:
    found = {record["key"]: record for message in told for record in message["reports"]}
    entries = {entry.key_hash: entry for entry, _ in parcels_of(plan)}
    reports, skipped = [], []
    for planned in plan.problems:
        key = key_of(plan, planned)
        record, entry = found.get(key), entries.get(key)
        if record is not None:
            proof = None if record["proof"] is None else Proof(**record["proof"])
            reports.append(ProblemReport(planned, entry, record["seconds"], record["error"], proof))
        elif entry is not None:
            reports.append(ProblemReport(replace(planned, entry=entry), entry, 0.0))
        else:
            skipped.append(planned)
    seconds = max(message["seconds"] for message in told)
    return WarmupReport(plan, tuple(reports), tuple(skipped), seconds, sum(message["workers"] for message in told))
