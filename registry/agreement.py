"""Ranks of one job agree on their choices, or together do without them.

    torch.distributed.init_process_group(...)
    agreement = registry.agree()            # every rank, once, before the first call
    print(agreement.reason)

Kernels that differ between ranks differ in rounding, and a step that one rank takes longer for keeps all others
waiting. Each rank sends one message of fixed size in one collective: what it would choose, as content hashes of its
tuned choices and of the tables it was shipped with, or why it cannot say. The collective is issued whatever happened
before it, so no rank waits for one that gave up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentValueError, IsokernError
from .plugins import missing_modules

if TYPE_CHECKING:
    from ..cache.environment import Environment
    from ..cache.plan import Plan
    from ..cache.sealed import ReadTables
    from ..cache.store import Store
    from .core import Registry

__all__ = ["Agreement", "DisagreementError", "RankState", "Standing", "agree"]

#: Bytes of one rank's message: four hashes and a sentence.
MESSAGE_BYTES = 4096
_DETAIL_CHARACTERS = 300  # of the sentence are sent; escaped, one is at most 12 bytes


class Standing(StrEnum):
    """What a rank can say of its tuned choices."""

    CHOICES = "choices"  # it has some
    NONE = "none"  # no store, or an empty one, and no plan
    DAMAGED = "damaged"  # some file of its store is unreadable; the rest is in the hash
    FAILED = "failed"  # looking raised; nothing is known


class DisagreementError(IsokernError, RuntimeError):
    """The ranks differ in more than their tuned choices: not even their heuristic choice would be the same.

    Raised on every rank. Attribute: ``ranks``, a :class:`RankState` for each.
    """

    def __init__(self, ranks: tuple[RankState, ...], message: str) -> None:
        self.ranks = ranks
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class RankState:
    """What one rank says of itself.

    Attributes:
        standing: see :class:`Standing`.
        choices: content hash of everything it would choose by plan or store; "" if it failed.
        tables: content hash of the shipped tables; "" where there are none, or if it failed.
        basis: hash of what decides without tuned choices: ops, backends with their sources and missing modules,
            environment overrides; "" if it failed.
        environment: hash of its device and versions; "" if it failed.
        detail: in words: how many choices, what is damaged, what was raised.
    """

    standing: Standing
    choices: str
    tables: str
    basis: str
    environment: str
    detail: str

    def to_message(self) -> bytes:
        """``MESSAGE_BYTES`` bytes, padded with spaces."""
        record = {**asdict(self), "detail": self.detail[:_DETAIL_CHARACTERS]}
        return json.dumps(record).encode("ascii").ljust(MESSAGE_BYTES)

    @classmethod
    def from_message(cls, message: bytes) -> RankState:
        record = json.loads(message)
        return cls(**{**record, "standing": Standing(record["standing"])})

    def same_as(self, other: RankState) -> bool:
        """Whether the two say the same of their plans and stores; their environments are part of that."""
        mine, theirs = ((rank.standing, rank.choices, rank.environment) for rank in (self, other))
        return mine == theirs


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the ranks found out. The same on every rank, but for ``rank``.

    Attributes:
        rank: this one. ranks: what each said, by rank.
        content_hash: of the plan that all now follow; "" where tuned choices are not used.
        reason: one sentence, which ``explain`` repeats.
        tables: whether what no plan decides goes by shipped tables, which all ranks have alike.
    """

    rank: int
    ranks: tuple[RankState, ...]
    content_hash: str
    reason: str
    tables: bool

    @property
    def ok(self) -> bool:
        """Whether all ranks follow the same plan; if not, all do without tuned choices."""
        return bool(self.content_hash)


def agree(registry: Registry, process_group: Any = None, device: str | None = None) -> Agreement:
    """Compare tuned choices over the ranks; from now on all use the same ones, or none.

    Collective: every rank of the group must call it, and does so once. If all would choose alike, what they would
    choose is pinned as a plan and the stores are read no more; else no rank uses plans or stores. What is left goes by
    the shipped tables as they are now, if all ranks have the same ones and the same environment, and then by the
    heuristic order. Calling it again compares anew what the stores then hold.

    Args:
        process_group: None takes the default group, or just this process if there is none.
        device: whose environment counts; None takes ``cuda`` where there is one, else ``cpu``.

    Raises:
        ArgumentValueError: this process is not in the group.
        DisagreementError: the ranks have other backends, versions or overrides; on every rank.
        RuntimeError: the collective itself failed (torch.distributed).
    """
    exchange = _Exchange(process_group)
    from ..cache.sealed import SealedStore

    store, pinned = registry.store, registry.plan
    sealed = store if isinstance(store, SealedStore) else None
    if sealed is not None:
        store, pinned = sealed.store, sealed.plan
    plan: Plan | None = None
    tables: ReadTables | None = None
    try:
        store.refresh()
        state, plan, tables = _look(registry, store, pinned, device or _device())
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait; it goes into everyone's reason
        state = RankState(Standing.FAILED, "", "", "", "", f"{type(error).__name__}: {error}")
    ranks = exchange.all_gather(state)
    _require_one_basis(ranks)
    shared = bool(ranks[0].tables) and len({(rank.tables, rank.environment) for rank in ranks}) == 1
    kept = tables if shared else None
    if plan is None or any(not rank.same_as(ranks[0]) for rank in ranks):
        registry.pin(None)
        reason = _disagreement(ranks, shared)
        registry.use_store(SealedStore(store, pinned, reason, kept))
        return Agreement(exchange.rank, ranks, "", reason, shared)
    registry.pin(plan)
    agreed = f"plan {plan.content_hash}, which {len(ranks)} {'ranks have' if len(ranks) > 1 else 'rank has'} agreed on"
    registry.use_store(SealedStore(store, pinned, f"not in {agreed}", kept))
    reason = f"all follow {agreed} ({ranks[0].detail}{_of_tables(ranks, shared)})"
    return Agreement(exchange.rank, ranks, plan.content_hash, reason, shared)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- what this rank has


def _look(registry: Registry, store: Store, pinned: Plan | None, device: str) -> tuple[RankState, Plan, ReadTables]:
    from ..cache.plan import Plan
    from ..cache.sealed import ReadTables

    environment = registry.environment(device)
    prints = {op: {name: registry.fingerprint(op, name) for name in registry.backends(op)} for op in registry.names()}
    chosen = {choice.key_hash: choice for choice in Plan.from_store(store, environment, prints).choices}
    if pinned is not None:
        # In a call, a pinned choice comes before the store's unless its backend has changed.
        valid = (c for c in pinned.choices if prints.get(c.op, {}).get(c.backend) == c.fingerprint)
        chosen |= {choice.key_hash: choice for choice in valid}
    plan = Plan(environment, tuple(chosen.values()))
    damaged = _damaged(store, environment)
    if damaged:
        standing, detail = Standing.DAMAGED, damaged
    elif chosen:
        standing, detail = Standing.CHOICES, f"{len(chosen)} choices"
    else:
        standing, detail = Standing.NONE, "nothing tuned for this environment"
    tables = ReadTables(store, environment)
    basis = _basis(registry, prints)
    state = RankState(standing, plan.content_hash, tables.content_hash, basis, environment.hash, detail)
    return state, plan, tables


def _damaged(store: Store, environment: Environment) -> str:
    """Which of the environment's files cannot be used, and why, in words; "" if all can."""
    from ..cache.codec import InvalidRecordError

    found = []
    for layer in store.layers:
        try:
            for path in layer.entry_paths(environment.hash):
                try:
                    layer.read_path(path)
                except InvalidRecordError as error:
                    found.append(f"{path.name}: {error}")
        except OSError as error:
            found.append(f"{layer.name} layer: {error.strerror or error}")
    return f"{len(found)} damaged, such as {found[0]}" if found else ""


def _basis(registry: Registry, prints: Mapping[str, Mapping[str, str]]) -> str:
    from ..cache.codec import digest

    ops = {
        op: {
            "contract": registry.spec(op).contract_version,
            "override": registry.environment_override(op),
            "accuracy": registry.environment_accuracy(op),
            "backends": {n: [f, list(missing_modules(registry.backends(op)[n]))] for n, f in backends.items()},
        }
        for op, backends in prints.items()
    }
    return digest(ops)


# ---- what all have


class _Exchange:
    """One all-gather of equal-sized messages; without a group, this process alone."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group = group
        self._alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self._alone else dist.get_rank(group)
        if self.rank < 0:
            raise ArgumentValueError("process_group", "a group that this process is in", "another one")

    def all_gather(self, state: RankState) -> tuple[RankState, ...]:
        if self._alone:
            return (state,)
        import torch
        import torch.distributed as dist

        device = _collective_device(dist.get_backend_config(self._group))
        mine = torch.frombuffer(bytearray(state.to_message()), dtype=torch.uint8).to(device)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(every, mine, group=self._group)
        return tuple(RankState.from_message(bytes(message.cpu().tolist())) for message in every)


def _collective_device(backends: str) -> str:
    """Where the group's collectives take their tensors: ``"cpu:gloo,cuda:nccl"`` takes them on either."""
    return "cpu" if "cpu:" in backends else "cuda"


def _require_one_basis(ranks: tuple[RankState, ...]) -> None:
    looked = {rank.basis for rank in ranks if rank.standing is not Standing.FAILED}
    if len(looked) > 1:
        groups = "; ".join(f"ranks {_numbers(ranks, basis)}: {basis}" for basis in sorted(looked))
        raise DisagreementError(
            ranks,
            "the ranks differ in their backends, library versions, ISOKERN_BACKEND_ or ISOKERN_ACCURACY_ variables, so "
            f"that not even their heuristic choice is the same ({groups}); compare `isokern doctor` on them",
        )


def _numbers(ranks: tuple[RankState, ...], basis: str) -> str:
    return ", ".join(str(i) for i, rank in enumerate(ranks) if rank.basis == basis)


def _disagreement(ranks: tuple[RankState, ...], shared: bool) -> str:
    """What the majority has, and how each other rank differs from it. ``shared``: the tables count."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, rank in enumerate(ranks):
        groups.setdefault((rank.standing, rank.choices, rank.environment), []).append(i)
    parts = []
    for members in sorted(groups.values(), key=lambda m: (-len(m), m)):
        one = ranks[members[0]]
        who = f"rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"
        what = f"{one.standing.value} {one.choices}".rstrip()
        parts.append(f"{who}: {what} ({one.detail})")
    use = "what isokern ships and the heuristic order" if shared else "the heuristic order"
    return f"the ranks' tuned choices differ, so all use {use}: {'; '.join(parts)}{_of_tables(ranks, shared)}"


def _of_tables(ranks: tuple[RankState, ...], shared: bool) -> str:
    """What is said where shipped tables are there and do not count."""
    if shared or not any(rank.tables for rank in ranks):
        return ""
    return "; shipped tables are not used: the ranks have others, or other environments"
