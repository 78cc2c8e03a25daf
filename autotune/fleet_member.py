"""A member of a fleet: tunes, on its own device and into its own store, the problems it is sent.

A process of its own, since a signal must end its workers and only a process's main thread gets signals. It is sent
recipes and answers with entries, as JSON types, over a socket (:mod:`.fleet_process`) or through Ray
(:mod:`.fleet_ray`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ..cache.entry import Entry
from ..cache.layer import Layer
from ..cache.store import Store
from ..errors import IsokernError
from ..registry.core import Registry
from ..registry.ops.fused_sigmoid_gating.describe import describe
from .candidates import admit
from .channel import Channel, ChannelClosedError
from .compiling import Compilers, compilations, processors
from .device_lock import device_lock
from .plain import from_plain
from .progress import Progress
from .prove import prove
from .recipe import Origin, ProblemRecipe, find_backend, origin_of
from .tuner import NothingProvenError, Settings, Shared, Task, Workers, tune_problem
from .warmup import Interrupted, arch_of, interruptible

__all__ = ["Member", "MemberConfig", "main"]

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """What a member must know before it is sent anything.

    Attributes:
        op: name of the op. device: ``cpu`` or ``cuda``, the member's only one.
        lock: the device that the host's lock is named after (see :mod:`.device_lock`), or that name.
        threads: torch's intra-op threads, on a CPU.
        layers: (name, root, writable) of the store's layers; None takes the member's own machine's.
        backends: those to choose among. origins: where a member finds those that it cannot find by name.
        settings: a :class:`.tuner.Settings` as JSON types.
        processors: of its host, that are the member's to compile with; None: all.
    """

    op: str
    device: str
    lock: str
    threads: int
    layers: tuple[tuple[str, str, bool], ...] | None
    backends: tuple[str, ...]
    origins: Mapping[str, Mapping[str, str]]
    settings: Mapping[str, Any]
    processors: int | None = None

    @classmethod
    def of(
        cls, registry: Registry, op: str, device: str, threads: int, store: Store | None, settings: Settings, lock: str
    ) -> Self:
        """The configuration of a member that has this process's backends, and this store (None: its own)."""
        backends = registry.backends(op)
        origins = {name: origin.to_dict() for name, b in backends.items() if (origin := origin_of(b)) is not None}
        layers = None if store is None else tuple((x.name, str(x.root), x.writable) for x in store.layers)
        return cls(op, device, lock, threads, layers, tuple(backends), origins, asdict(settings))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Member:
    """One device's tuner.

    Args: config: a :class:`MemberConfig` as JSON types. registry: None takes this process's.
    """

    def __init__(self, config: Mapping[str, Any], registry: Registry | None = None) -> None:
        if registry is None:
            from .. import registry as package

            registry = package.default
        self.config = MemberConfig(**config)
        self.registry = registry
        self.settings = from_plain(Settings, self.config.settings)
        self._choose_backends()
        if self.config.device == "cpu":
            import torch

            torch.set_num_threads(self.config.threads)
        if self.config.layers is None:
            self.store = Store.default()
        else:
            self.store = Store([Layer(name, Path(root), writable) for name, root, writable in self.config.layers])
        self.environment = registry.environment(self.config.device)
        self.workers = Workers(self.config.device, self.config.threads, self.settings.limits)
        self.compilers = Compilers(self._share(), self.settings.limits)
        self._shared = Shared()
        self._published: list[tuple[ProblemRecipe, Entry]] = []
        self._told: list[str] = []

    def _choose_backends(self) -> None:
        for name in self.config.backends:
            origin = self.config.origins.get(name)
            find_backend(self.registry, self.config.op, name, Origin(**origin) if origin else None)
        for name in set(self.registry.backends(self.config.op)) - set(self.config.backends):
            self.registry.unregister_backend(self.config.op, name)

    def _share(self) -> int:
        """Processes that compile: other members of this host do so at the same time."""
        if self.environment.device == "cpu":
            return 1
        return processors() if self.config.processors is None else max(1, self.config.processors)

    def perform(self, do: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one request: ``hello``, ``tune`` or ``prove``. Raises: WorkerError, if the device is out of order."""
        match do:
            case "hello":
                return {"environment": self.environment.to_dict()}
            case "tune":
                return self.tune([ProblemRecipe.from_dict(record) for record in arguments["recipes"]])
            case "prove":
                return self.prove()
        raise ValueError(f"request: {do!r} is none that a member knows")

    def tune(self, recipes: list[ProblemRecipe]) -> dict[str, Any]:
        """Tune each recipe's problem, from the store if it is known there.

        Returns: ``results``, for each recipe ``entry`` (or None), ``error`` (or "") and ``seconds``; ``notes``, lines
        worth showing; ``spawned``, worker processes started so far.
        """
        progress = _Notes()
        self._compile(recipes, progress)
        results = [self._tune(recipe, progress) for recipe in recipes]
        return {"results": results, "notes": progress.lines, "spawned": self.workers.spawned}

    def _compile(self, recipes: list[ProblemRecipe], progress: Progress) -> None:
        """Have all kernels there before anything is measured, with this member's share of the processors."""
        environment = self.environment
        if environment.device == "cpu":
            return
        problems = [describe(r.case, environment.device, arch_of(environment), r.mode, r.accuracy) for r in recipes]
        tasks = [Task(recipe, problem) for recipe, problem in zip(recipes, problems, strict=True)]
        fields = [(task, admit(self.registry, self.config.op, task.problem).candidates) for task in tasks]
        self.compilers.submit(compilations(fields))
        self.compilers.wait()
        while self.compilers.failures:
            progress.note(f"not compiled ahead: {self.compilers.failures.pop(0)}")

    def _tune(self, recipe: ProblemRecipe, progress: Progress) -> dict[str, Any]:
        began = time.monotonic()
        environment = self.environment
        problem = describe(recipe.case, environment.device, arch_of(environment), recipe.mode, recipe.accuracy)
        entry, error = None, ""
        with device_lock(self.config.lock, progress.note):
            self.store.refresh()  # whoever held the lock before may have tuned this very problem
            try:
                entry = tune_problem(
                    Task(recipe, problem),
                    registry=self.registry,
                    store=self.store,
                    environment=environment,
                    workers=self.workers,
                    settings=self.settings,
                    progress=progress,
                    shared=self._shared,
                )
            except NothingProvenError as nothing:
                error = str(nothing)
        if entry is not None:
            self._published.append((recipe, entry))
        record = None if entry is None else entry.to_dict()
        return {"entry": record, "error": error, "seconds": time.monotonic() - began}

    def prove(self) -> dict[str, Any]:
        """Have a fresh process dispatch what was tuned here: ``proofs``, in the order of tuning."""
        self.workers.close()
        if not self._published:
            return {"proofs": []}
        device, threads = self.config.device, self.config.threads
        proofs = prove(self.store, self.registry, self._published, device=device, threads=threads)
        return {"proofs": [asdict(proof) for proof in proofs]}

    def close(self) -> None:
        """End the workers. Idempotent."""
        self.compilers.close()
        self.workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def main(argv: list[str]) -> int:
    """Serve on the socket whose descriptor is the only argument, until it closes or a signal comes."""
    channel = Channel(socket.socket(fileno=int(argv[1])))
    try:
        with interruptible():
            hello = channel.receive()
            _end_with(hello["parent"])
            sys.path.extend(path for path in hello["paths"] if path not in sys.path)
            with Member(hello["config"]) as member:
                while True:
                    request = channel.receive()
                    channel.send(_answer(member, request))
    except ChannelClosedError:
        return 0
    except Interrupted as interrupted:
        return 128 + interrupted.signal


def _answer(member: Member, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"result": member.perform(request["do"], request)}
    except Interrupted:
        raise
    except IsokernError as error:
        return {"fault": f"{type(error).__name__}: {error}"}


def _end_with(parent: int) -> None:
    """Get SIGTERM when the coordinator dies, however it dies: the device must not stay busy for nobody."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise Interrupted(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
