"""EngineSession: an engine in a process of its own, asked to run conformance checks.

Triton's interpreter must be chosen before Triton is imported and cannot share a process with its compiler; a kernel
that runs wild must not take the asking process with it. One session serves any number of requests.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Self

from ..autotune.channel import Channel, ChannelClosedError
from ..errors import IsokernError
from ..registry.backend import Config
from ..registry.conformance.check import Finding, Status, Tier
from ..registry.conformance.report import Report
from . import ENGINES

__all__ = ["EngineSession"]

_QUOTED = 2000  # characters of a dead engine's last output that are passed on


class EngineSession:
    """Starts its process at the first request, and a new one after it died.

    Args:
        backend: name of a backend with an engine.

    Raises:
        MissingEngineError: at once, if the engine lacks something it needs.
    """

    def __init__(self, backend: str) -> None:
        self.info = ENGINES[backend]
        self.info.require()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._output: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run_checks(
        self,
        only: Sequence[str] | None = None,
        tier: Tier = Tier.FAST,
        config: Config | None = None,
        on_progress: Callable[[Finding], None] | None = None,
    ) -> Report:
        """``registry.conformance.runner.run_checks`` over the backend, inside the engine.

        An engine that dies of a check makes an ``error`` finding, after those made until then.

        Raises:
            IsokernError: the request itself is wrong, or the process cannot be started.
        """
        channel = self._channel or self._start()
        findings: list[Finding] = []
        values = None if config is None else config.to_dict()
        try:
            channel.send({"only": None if only is None else list(only), "tier": tier.value, "config": values})
            while "finding" in (message := channel.receive()):
                findings.append(Finding.from_dict(message["finding"]))
                if on_progress is not None:
                    on_progress(findings[-1])
        except ChannelClosedError:
            return self._died(findings, only, config)
        if "error" in message:
            raise IsokernError(message["error"])
        return Report.from_dict(message["report"])

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

    def _start(self) -> Channel:
        ours, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        with theirs:
            self._process = subprocess.Popen(
                # -P: the current directory's files must not stand in for installed modules
                [sys.executable, "-P", "-m", "isokern.engines.serve", str(theirs.fileno()), self.info.backend],
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
            message = f"the engine {self.info.name} does not start: {self._post_mortem()}"
            self.close()
            raise IsokernError(message) from None
        self._channel = channel
        return channel

    def _died(self, findings: list[Finding], only: Sequence[str] | None, config: Config | None) -> Report:
        last = findings[-1].check if findings else (only[0] if only else "engine")
        how = f"the engine {self.info.name} died, in this case or the next: {self._post_mortem()}"
        self.close()
        case = findings[-1].case if findings else "start"
        return Report(
            op="fused_sigmoid_gating",
            backend=self.info.backend,
            config="default" if config is None else config.label,
            findings=(*findings, Finding(last, case, Status.ERROR, how)),
            skipped=(),
            titles={last: ""},
            excused={},
            place=self.info.name,
        )

    def _post_mortem(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _QUOTED))
        printed = self._output.read().decode(errors="replace").strip()
        return f"{how}\n{printed}" if printed else how
