"""A process that runs conformance checks for this one: started when first asked, replaced when a backend has killed it.

Requests, findings and reports are lines of JSON over a socket pair; what it prints is kept, to be quoted if it dies.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from ...autotune.channel import Channel, ChannelClosedError
from ...errors import IsokernError
from ..backend import Backend, Config
from .check import Finding, Status, Tier
from .report import Report

__all__ = ["CheckProcess", "DeviceProcess"]

_QUOTED = 2000  # characters of a dead process's last output that are passed on


class _DiedError(Exception):
    """It ended instead of answering; the message says how, and what it printed last."""


class CheckProcess:
    """``python -m MODULE FD *ARGUMENTS``. One process at a time, for one thread's requests.

    Args:
        what: what it is called in errors.
    """

    def __init__(self, what: str, module: str, *arguments: str) -> None:
        self._what = what
        self._command = (module, arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._output: Any = None
        self._lock = threading.Lock()
        self._killed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. The next request starts another."""
        if self._channel is not None:
            self._channel.close()  # it ends when nobody is there to ask
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(1)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def kill(self) -> None:
        """From another thread: end the process in the middle of what it does, and start no other."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def ask(self, request: Mapping[str, Any], on_finding: Callable[[Finding], None] | None = None) -> dict[str, Any]:
        """Its answer to ``request``; findings are handed on as they come.

        Raises:
            IsokernError: the request itself is wrong, or the process cannot be started, or dies of it.
        """
        try:
            return self._ask(request, on_finding)
        except _DiedError as died:
            raise IsokernError(f"{self._what} died: {died}") from None

    def _ask(self, request: Mapping[str, Any], on_finding: Callable[[Finding], None] | None) -> dict[str, Any]:
        channel = self._channel or self._start()
        try:
            channel.send(request)
            while "finding" in (message := channel.receive()):
                if on_finding is not None:
                    on_finding(Finding.from_dict(message["finding"]))
        except ChannelClosedError:
            how = self._post_mortem()
            self.close()
            raise _DiedError(how) from None
        if "error" in message:
            raise IsokernError(message["error"])
        return message

    def _report(
        self, request: Mapping[str, Any], blank: Report, on_progress: Callable[[Finding], None] | None
    ) -> Report:
        """Of the checks in ``request``; ``blank`` is the report of a process that dies of one, without findings."""
        findings: list[Finding] = []

        def note(finding: Finding) -> None:
            findings.append(finding)
            if on_progress is not None:
                on_progress(finding)

        try:
            return Report.from_dict(self._ask(request, note)["report"])
        except _DiedError as died:
            only = request["only"]
            last = findings[-1].check if findings else (only[0] if only else "engine")
            case = findings[-1].case if findings else "start"
            message = f"{self._what} died, in this case or the next: {died}"
            found = (*findings, Finding(last, case, Status.ERROR, message))
            return replace(blank, findings=found, titles={last: ""})

    def _start(self) -> Channel:
        ours, theirs = socket.socketpair()
        module, arguments = self._command
        with theirs, self._lock:
            if self._killed:
                ours.close()
                raise IsokernError(f"{self._what} was ended")
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self._process = subprocess.Popen(
                # -P: the current directory's files must not stand in for installed modules
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
            )
        channel = Channel(ours)
        try:
            channel.receive()  # ready
        except ChannelClosedError:
            channel.close()
            message = f"{self._what} does not start: {self._post_mortem()}"
            self.close()
            raise IsokernError(message) from None
        self._channel = channel
        return channel

    def _post_mortem(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _QUOTED))
        printed = self._output.read().decode(errors="replace").strip()
        return f"{how}\n{printed}" if printed else how


class DeviceProcess(CheckProcess):
    """Runs any registered backend on any device, in a process that may die of it.

    Args:
        threads: torch's, in that process.
        imports: modules, or files, that register backends; what was registered by other means is unknown there.
    """

    def __init__(self, threads: int, imports: Sequence[str] = ()) -> None:
        settings = {"threads": threads, "imports": list(imports), "path": sys.path}
        super().__init__("the process", "isokern.registry.conformance.serve", json.dumps(settings))

    def elsewhere(self, op: str, backend: Backend, device: str) -> str | None:
        """``runner.belongs_elsewhere``, so that this process needs no context on the device to find out."""
        reason: str | None = self.ask({"elsewhere": [op, backend.name, device]})["reason"]
        return reason

    def run_checks(
        self,
        op: str,
        backend: str,
        only: Sequence[str],
        tier: Tier,
        config: Config | None,
        device: str,
        on_progress: Callable[[Finding], None] | None = None,
    ) -> Report:
        """``runner.run_checks``, there. A process that dies of a check makes an ``error`` finding of it.

        Raises:
            IsokernError: the request itself is wrong, or the process cannot be started.
        """
        values = None if config is None else config.to_dict()
        request = {"op": op, "backend": backend, "only": list(only), "tier": tier.value, "config": values}
        label = "default" if config is None else config.label
        blank = Report(op, backend, label, (), (), {}, {}, place="")  # a GPU's name is not known here
        return self._report({**request, "device": device}, blank, on_progress)
