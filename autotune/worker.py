"""Worker: a process that runs candidates, and may die of them.

Started by ``python -m``, not by ``multiprocessing``: nothing of the parent is imported again, and nothing is
pickled. It speaks JSON over its own socket; what a candidate prints goes to a file that is quoted when it dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import psutil

from ..errors import IsokernError
from ..registry.decision import RejectCode, Rejected
from .channel import Channel, ChannelClosedError

__all__ = ["CANARY", "CandidateFailure", "Limits", "Worker", "WorkerError"]

#: What the canary, a small matrix product with integer values, sums to on every device.
CANARY = 64 * 64 * 63 // 2

_QUOTED = 300  # characters of a dead worker's last output that go into the reason
_GONE_S = 5.0  # for a killed process to be reaped


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds a worker gets.

    Attributes:
        boot: to start and import torch. load: to make a problem's inputs.
        bind: to import and compile one candidate; 60 s is what the slowest compilers of this field need.
        call: for one call of a candidate, a lazy compiler's first one included.
        gate: for one candidate's gate, the float64 reference included.
    """

    boot: float = 180.0
    load: float = 120.0
    bind: float = 60.0
    call: float = 60.0
    gate: float = 180.0


class WorkerError(IsokernError, RuntimeError):
    """The tuner's own machinery fails: a worker does not start, the canary or the gate breaks. No candidate's fault."""


class CandidateFailure(IsokernError, RuntimeError):
    """A request failed, and the fault is the candidate's.

    Attributes:
        verdict: code and reason.
        at: the candidate the worker was busy with, if the request named several.
        died: whether the worker process is gone.
    """

    def __init__(self, verdict: Rejected, at: str | None = None, died: bool = False) -> None:
        self.verdict = verdict
        self.at = at
        self.died = died
        super().__init__(f"[{verdict.code.value}] {verdict.reason}")


class Worker:
    """Starts at the first request, and again at the first request after it died or was replaced.

    Args:
        device: what it computes on; the parent never initialises it.
        threads: torch's intra-op threads in the worker (CPU only).
        environment: variables that the process has besides this one's.

    Attributes: ``spawned``, how many processes were started.
    """

    def __init__(
        self,
        device: str = "cpu",
        threads: int = 1,
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = environment
        self.device = device
        self.threads = threads
        self.limits = limits or Limits()
        self.spawned = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._output: Any = None
        self._greeted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def request(self, do: str, limit_s: float, **arguments: Any) -> dict[str, Any]:
        """Have the worker do something, and wait for the answer.

        Args:
            limit_s: seconds; anew for each candidate the worker announces it is at.

        Raises:
            CandidateFailure: it raised, died, or took too long (then it was killed with all it had started).
            WorkerError: no worker could be started.
        """
        channel = self._channel if self.alive and self._channel is not None else self._launch()
        if not self._greeted:
            self._greet(channel)
        return self._ask(channel, do, limit_s, arguments)

    def begin(self) -> None:
        """Start the process without waiting for it; the first request will.

        The process lives no longer than the thread that starts it.
        """
        if not self.alive:
            self._launch()

    def _ask(self, channel: Channel, do: str, limit_s: float, arguments: dict[str, Any]) -> dict[str, Any]:
        self._output.truncate(0)  # only what this request prints is of interest if it kills the worker
        with contextlib.suppress(ChannelClosedError):  # the answer tells
            channel.send({"do": do, **arguments})
        return self._answer(channel, do, limit_s)

    def _answer(self, channel: Channel, do: str, limit_s: float) -> dict[str, Any]:
        at: str | None = None
        try:
            while "at" in (message := channel.receive(limit_s)):
                at = str(message["at"])
        except TimeoutError:
            self.kill()
            reason = f"{do} took longer than {limit_s:g} s; the worker was killed"
            raise CandidateFailure(Rejected(RejectCode.TIMEOUT, reason), at, died=True) from None
        except (ChannelClosedError, ValueError):  # ValueError: what it sent is no JSON
            reason = f"the worker died in {do}: {self._post_mortem()}"
            self.kill()
            raise CandidateFailure(Rejected(RejectCode.CRASH, reason), at, died=True) from None
        if "fault" in message:
            raise WorkerError(f"{do}: {message['fault']}")
        if "code" in message:
            raise CandidateFailure(Rejected(RejectCode(message["code"]), message["reason"]), at)
        result = message["result"]
        assert isinstance(result, dict)
        return result

    def _launch(self) -> Channel:
        self.kill()
        ours, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        with theirs:
            self._process = subprocess.Popen(
                # -P: the current directory's files must not stand in for installed modules
                [sys.executable, "-P", "-m", "isokern.autotune.worker_main", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env=None if self._environment is None else {**os.environ, **self._environment},
                start_new_session=True,  # one group to kill, and no terminal signals past the parent
            )
        self.spawned += 1
        self._channel = channel = Channel(ours)
        paths = [os.getcwd() if path == "" else path for path in sys.path]
        hello = {"device": self.device, "threads": self.threads, "paths": paths, "parent": os.getpid()}
        with contextlib.suppress(ChannelClosedError):  # then it is dead, and will be found so
            channel.send({"do": "hello", **hello})
        return channel

    def _greet(self, channel: Channel) -> None:
        try:
            hello = self._answer(channel, "hello", self.limits.boot)
        except CandidateFailure as failure:
            raise WorkerError(f"a worker for {self.device} does not start: {failure.verdict.reason}") from failure
        if hello["canary"] != CANARY:
            self.kill()
            raise WorkerError(f"the canary on {self.device} gives {hello['canary']}, not {CANARY}: a broken device")
        self._greeted = True

    def _post_mortem(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            how = "it closed its channel"
        else:
            how = f"killed by {_signal_name(-status)}" if status < 0 else f"exited with status {status}"
        printed = self._last_output()
        return f"{how}; it printed: {printed}" if printed else how

    def _last_output(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _QUOTED))
        text: str = self._output.read().decode(errors="replace")
        return " | ".join(line.strip() for line in text.splitlines() if line.strip())

    def end(self) -> None:
        """End the process while another thread waits for its answer; that thread is told that it died."""
        if self._process is not None:
            _kill_tree(self._process)

    def kill(self) -> None:
        """End the process and all it started. The next request starts a fresh one. Idempotent."""
        process, self._process, self._greeted = self._process, None, False
        if process is not None:
            _kill_tree(process)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._output is not None:
            self._output.close()
            self._output = None


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process, its descendants, and its process group (orphans keep the group, not the parent)."""
    victims: list[psutil.Process] = []
    try:
        root = psutil.Process(process.pid)
        victims = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        pass  # already dead; its group may live on
    # It leads its own session, so its pid names the group. PermissionError: macOS, for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
