"""Members of a fleet as Ray actors: one per GPU of a cluster, whatever kinds of GPU it has.

Ray gives each actor its GPU and starts it where that is; tuning and splitting the work are as on one host. An actor
tunes into its own machine's store, and what it found comes back to the coordinator's.

Of Ray this uses ``init``, ``cluster_resources``, ``remote``, ``wait``, ``get``, ``kill`` and ``exceptions.RayError``.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

from ..errors import ArgumentValueError, IsokernError
from .fleet_member import Member, MemberConfig
from .worker import WorkerError

__all__ = ["RayLauncher"]

_CPUS_PER_MEMBER = 2  # its own and its worker's; compilers take their share of the cluster's unasked


class RayLauncher:
    """An actor per GPU of the cluster; see :class:`.fleet.Launcher`.

    Args:
        config: of all members; they use their own machines' stores.
        address: of the cluster, as for ``ray.init``. members: how many; None takes one per GPU.
        ray: the module; imported if None.

    Raises:
        WorkerError: Ray is not installed, or the cluster has no GPU. ArgumentValueError: more members than GPUs.
    """

    def __init__(
        self,
        config: MemberConfig,
        address: str = "auto",
        members: int | None = None,
        ray: ModuleType | None = None,
    ) -> None:
        self._ray: Any = _import_ray() if ray is None else ray
        self._ray.init(address=address, ignore_reinit_error=True)
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        if config.device == "cuda" and not gpus:
            raise WorkerError(f"the Ray cluster at {address!r} has no GPU")
        count = members if members is not None else gpus or 1
        if config.device == "cuda" and count > gpus:
            raise ArgumentValueError("members", f"at most the cluster's {gpus} GPUs", str(count))
        each = int(self._ray.cluster_resources().get("CPU", 0)) // count  # an actor sees its own GPU alone
        self.config = replace(config, layers=None, processors=each or None)
        self.names = tuple(f"ray:{number}" for number in range(count))
        self._actors: list[Any] = []
        self._pending: dict[Any, int] = {}

    def start(self) -> None:
        """Create the actors; Ray starts them where a GPU is free."""
        needs = {"num_gpus": 1 if self.config.device == "cuda" else 0, "num_cpus": _CPUS_PER_MEMBER}
        remote = self._ray.remote(**needs)(_Actor)
        # Actors may share a host. Ray keeps them off each other's GPU; on a CPU the lock keeps them off each other.
        self._actors = [remote.remote(self.config.to_dict()) for _ in self.names]

    def submit(self, member: int, do: str, **arguments: Any) -> None:
        """Have ``member`` do something."""
        self._pending[self._actors[member].perform.remote(do, arguments)] = member

    def wait(self) -> tuple[int, dict[str, Any]]:
        """The next answer, of whichever member."""
        [ready, *_], _ = self._ray.wait(list(self._pending), num_returns=1)
        member = self._pending.pop(ready)
        try:
            answer: dict[str, Any] = self._ray.get(ready)
        except self._ray.exceptions.RayError as error:  # its node or process is gone, or it could not be made
            answer = {"fault": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        return member, answer

    def close(self) -> None:
        """End the actors. The cluster and the connection to it stay. Idempotent."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        self._pending.clear()


class _Actor:
    """What runs on the cluster: a member that answers as one of :mod:`.fleet_process` does."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._member = Member(config)

    def perform(self, do: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": self._member.perform(do, arguments)}
        except IsokernError as error:
            return {"fault": f"{type(error).__name__}: {error}"}


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise WorkerError("Ray is not installed: pip install 'isokern[ray]'") from error
    module: ModuleType = ray
    return module
