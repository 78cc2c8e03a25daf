"""The worker's process: ``python -m isokern.autotune.worker_main FD`` serves requests until the other side closes.

Requests are ``{"do": ..., ...}``; answers ``{"result": {...}}``, ``{"code": ..., "reason": ...}`` for what a
candidate did wrong, or ``{"fault": ...}`` for what isokern itself did. A candidate that calls ``sys.exit`` ends the
process, as it would end an engine's, and the tuner notices.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

from ..registry.decision import RejectCode
from .channel import Channel, ChannelClosedError

__all__ = ["main", "serve"]

_PR_SET_PDEATHSIG = 1

#: What torch and drivers say when memory runs out, where they raise a plain RuntimeError.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


def main(argv: list[str]) -> int:
    """Serve on the socket whose descriptor is the only argument."""
    channel = Channel(socket.socket(fileno=int(argv[1])))
    try:
        hello = channel.receive()
        _die_with(hello["parent"])
        sys.path.extend(path for path in hello["paths"] if path not in sys.path)
        from .session import Session  # imports torch, so only now

        session = Session(hello["device"], hello["threads"])
        channel.send({"result": {"canary": session.canary()}})
        serve(channel, session)
    except ChannelClosedError:
        return 0
    return 0


def serve(channel: Channel, session: Any) -> None:
    """Answer requests one by one. Raises: ChannelClosedError, when the tuner is gone or done."""
    forks = _ForkCount()
    while True:
        request = channel.receive()
        name = request.pop("do")
        before = forks.seen
        answer = _answer(session, name, request, lambda at: channel.send({"at": at}))
        if forks.seen > before:
            text = f"called os.fork() in {name}: two processes would go on as one engine"
            answer = {"code": RejectCode.CRASH.value, "reason": text}
        channel.send(answer)


def _answer(session: Any, name: str, arguments: Mapping[str, Any], at: Any) -> dict[str, Any]:
    try:
        return {"result": session.perform(name, arguments, at)}
    except MemoryError as error:
        return _rejected(RejectCode.MEMORY, error)
    except Exception as error:  # noqa: BLE001 - a candidate may raise anything, and the answer says what
        code = getattr(error, "reject_code", None)  # set where the session knows better
        if getattr(error, "own_fault", False):
            return {"fault": str(error)}
        text = str(error).lower()
        if any(words in text for words in _OUT_OF_MEMORY):
            code = RejectCode.MEMORY
        return _rejected(code or RejectCode.RAISED, error)


def _rejected(code: RejectCode, error: BaseException) -> dict[str, Any]:
    reason = str(error) if hasattr(error, "reject_code") else f"{type(error).__name__}: {error}".rstrip(": ")
    return {"code": code.value, "reason": reason}


class _ForkCount:
    """Notices forks of this process; the child's copy of the channel refuses to send (see ``Channel``)."""

    def __init__(self) -> None:
        self.seen = 0
        os.register_at_fork(after_in_parent=self._count)

    def _count(self) -> None:
        self.seen += 1


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when the tuner dies, however it dies; and leave no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request above
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
