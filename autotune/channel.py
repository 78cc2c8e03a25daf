"""One JSON object per line over a socket pair: how tuner and worker talk, whatever a candidate prints."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["Channel", "ChannelClosedError"]

_CHUNK = 1 << 16


class ChannelClosedError(EOFError):
    """The other side is gone."""


class Channel:
    """Line-framed JSON in both directions. A forked child of either side cannot speak on it.

    Args:
        end: a connected stream socket; the channel owns it.
    """

    def __init__(self, end: socket.socket) -> None:
        end.set_inheritable(False)  # what a candidate starts must not keep the worker's end open after its death
        self._socket = end
        self._buffer = bytearray()
        self._owner = os.getpid()

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises: ChannelClosedError; ValueError for what JSON cannot hold (NaN and infinity included)."""
        if os.getpid() != self._owner:
            os._exit(1)  # a candidate forked and its child came back here
        data = json.dumps(dict(message), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            self._socket.settimeout(None)
            self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosedError(str(error)) from error

    def receive(self, limit_s: float | None = None) -> dict[str, Any]:
        """The next message.

        Raises: ChannelClosedError; TimeoutError when none is complete within ``limit_s`` seconds.
        """
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while (end := self._buffer.find(b"\n")) < 0:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(_CHUNK)
            except TimeoutError:
                raise
            except OSError as error:
                raise ChannelClosedError(str(error)) from error
            if not data:
                raise ChannelClosedError("end of stream")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ChannelClosedError(f"expected an object, given {type(message).__name__}")
        return message

    def close(self) -> None:
        self._socket.close()
