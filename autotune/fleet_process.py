"""Members of a fleet as processes of this host, one per device."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil

from ..errors import ArgumentValueError
from .channel import Channel, ChannelClosedError
from .compiling import processors
from .fleet_member import MemberConfig
from .gpu_identity import VISIBLE, physical_name, visible_entries

__all__ = ["ProcessLauncher", "Slot", "local_slots"]

_BOOT_S = 180.0  # to import torch and read the device on a busy machine
_END_S = 20.0  # for a member to end its workers after SIGTERM


@dataclass(frozen=True, slots=True)
class Slot:
    """A place to tune on.

    Attributes:
        name: for people. device: ``cpu`` or ``cuda``.
        visible: what CUDA_VISIBLE_DEVICES is set to in its process, so that its device is the only one there; None
            leaves it. lock: name of the host's lock on it.
    """

    name: str
    device: str
    visible: str | None
    lock: str


def local_slots(device: str, wanted: Sequence[int] | None = None) -> tuple[Slot, ...]:
    """A slot for each CUDA device of this host, or for those of the indices ``wanted``; the CPU is one slot.

    Raises: ArgumentValueError, for an index that is not there.
    """
    if device == "cpu":
        if wanted not in (None, (0,)):
            raise ArgumentValueError("--devices", "one CPU", repr(wanted))
        return (Slot("cpu", "cpu", None, "cpu"),)
    import torch

    count = torch.cuda.device_count()  # asks the driver, creates no context
    entries = visible_entries()
    names = [str(index) for index in range(count)] if entries is None else entries[:count]
    chosen = range(len(names)) if wanted is None else wanted
    for index in chosen:
        if not 0 <= index < len(names):
            expected = f"indices below {len(names)}, the CUDA devices of this host"
            raise ArgumentValueError("--devices", expected, str(index))
    # Named here, where the index means something: in the member's process every device is the first.
    return tuple(Slot(f"cuda:{i}", "cuda", names[i], physical_name(f"cuda:{i}")) for i in chosen)


class ProcessLauncher:
    """Starts a member per slot; see :class:`.fleet.Launcher`.

    Args: config: of all members, but for what the slot decides.
    """

    def __init__(self, slots: Sequence[Slot], config: MemberConfig) -> None:
        self.slots = tuple(slots)
        self.config = replace(config, processors=max(1, processors() // max(1, len(self.slots))))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._selector = selectors.DefaultSelector()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots)

    def start(self) -> None:
        """Start all. They boot while the caller goes on."""
        for number, slot in enumerate(self.slots):
            ours, theirs = socket.socketpair()
            environment = dict(os.environ)
            if slot.visible is not None:
                environment[VISIBLE] = slot.visible
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "isokern.autotune.fleet_member", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                    start_new_session=True,  # the terminal's signals go to the coordinator alone
                )
            self._processes.append(process)
            self._channels.append(Channel(ours))
            self._selector.register(ours, selectors.EVENT_READ, number)
            config = {**self.config.to_dict(), "device": slot.device, "lock": slot.lock}
            paths = [os.getcwd() if path == "" else path for path in sys.path]
            with contextlib.suppress(ChannelClosedError):  # it died at once: wait() says so
                self._channels[number].send({"config": config, "paths": paths, "parent": os.getpid()})

    def submit(self, member: int, do: str, **arguments: Any) -> None:
        """Have ``member`` do something. One that is gone answers so."""
        with contextlib.suppress(ChannelClosedError):
            self._channels[member].send({"do": do, **arguments})

    def wait(self) -> tuple[int, dict[str, Any]]:
        """The next answer, of whichever member: its ``result``, or the ``fault`` that ended its use."""
        [(key, _), *_] = self._selector.select()
        member = int(key.data)
        try:
            answer = self._channels[member].receive(_BOOT_S)
        except (ChannelClosedError, TimeoutError):
            answer = {"fault": f"its process is gone ({self._status(member)})"}
        if "fault" in answer:
            self._selector.unregister(key.fileobj)
        return member, answer

    def _status(self, member: int) -> str:
        try:
            return f"status {self._processes[member].wait(5.0)}"
        except subprocess.TimeoutExpired:
            return "it closed its channel"

    def close(self) -> None:
        """End all members and their workers. Idempotent."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                _kill(process)
        for channel in self._channels:
            channel.close()
        self._processes.clear()
        self._channels.clear()
        self._selector.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a member and all it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()
